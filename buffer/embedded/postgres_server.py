"""A Postgres server on a directory, with the database `buffer` in it.

Promises: what it committed is on disk (fsync and synchronous_commit are on); a start that was cut off
leaves nothing that the next one trips over; after kill() the next start works at once. As root the
server runs as an unprivileged user, wherever its programs and its data are.
"""

from __future__ import annotations

import os
import secrets
import shutil
import signal
import sys
from typing import TYPE_CHECKING, Literal
from urllib.parse import quote

from buffer.embedded import keeper
from buffer.embedded.account import Account, postgres_account
from buffer.embedded.binaries import find_postgres
from buffer.embedded.process import Server, free_port, remove_except, wait_until
from buffer.errors import BufferError, EmbeddedError
from buffer.store.provision import ensure_database

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from buffer.embedded.workspace import Workspace

DATABASE = "buffer"
SOCKET_PORT = 5432
INITDB_SECONDS = 120.0
START_SECONDS = 300.0
"""Recovery after a crash replays at most max_wal_size of log, even on a slow disk, in that time."""
KEPT_BY_WIPE = {"postgres.log", ".guard", ".lock"}

SETTINGS: Mapping[str, str] = {
    "fsync": "on",
    "synchronous_commit": "on",
    "shared_buffers": "64MB",
    "max_connections": "60",
    # Three processes fewer; a small server gains nothing from them.
    "io_method": "sync",
    # In the data directory, so that killed servers leave nothing in /dev/shm.
    "dynamic_shared_memory_type": "mmap",
    "log_timezone": "UTC",
    "timezone": "UTC",
    "unix_socket_permissions": "0700",
}


class PostgresServer(Server):
    """One Postgres cluster: user `postgres`, database `buffer`. ``config`` adds server settings."""

    name = "postgres"

    def __init__(
        self,
        directory: Path,
        *,
        config: Mapping[str, str] | None = None,
        tcp: bool = False,
        password: str | None = None,
        folder: str = "",
        workspace: Workspace | None = None,
    ) -> None:
        super().__init__(directory, folder, workspace)
        self.config = dict(config or {})
        self.port = free_port() if tcp else None
        self.password = password or (secrets.token_urlsafe(24) if tcp else None)
        self.data = self.directory / "data"
        self._sockets = self._workspace.runtime / "pg"
        self._programs = find_postgres()

    @property
    def url(self) -> str:
        """Where to connect, as asyncpg takes it."""
        if self.port is None:
            return f"postgresql://postgres@/{DATABASE}?host={quote(str(self._sockets))}"
        return f"postgresql://postgres:{quote(self.password or '', safe='')}@127.0.0.1:{self.port}/{DATABASE}"

    async def stop(self, mode: Literal["fast", "immediate"] = "fast") -> None:
        """Fast: end sessions, checkpoint. Immediate: the next start recovers. SIGKILL after 10 s."""
        await self._stop(signal.SIGINT if mode == "fast" else signal.SIGQUIT)

    def wipe(self) -> None:
        """Remove its data; the next start makes a new cluster. It must not be running."""
        self._refuse_if_running("wipe")
        remove_except(self.directory, KEPT_BY_WIPE)

    def _killed(self) -> None:
        keeper.release_shared_memory(str(self.data / "postmaster.pid"))

    async def _launch(self) -> None:
        account = postgres_account(self.data)
        self._prepare(account)
        fresh = not self.data.exists()
        if fresh:
            await self._make_cluster(account)
        # No server runs on these data: we hold the guard, and start() has killed what held it. A file
        # that says otherwise is of a dead one, and would name whoever has its pid now.
        self._refuse_foreign_server()
        (self.data / "postmaster.pid").unlink(missing_ok=True)
        self._write_access_rules()
        settings = {**SETTINGS, **self._address(), **self.config}
        words = [word for name, value in settings.items() for word in ("-c", f"{name}={value}")]
        where = self._data_argument(self.data, account)
        self._spawn([self._programs.postgres, "-D", where, *words], cwd=self.data, account=account)
        await self._wait_until_ready()
        try:
            await ensure_database(
                str(self._sockets), self.port or SOCKET_PORT, DATABASE, self.password, fresh=fresh
            )
        except BufferError as error:
            raise self._failure(f"refuses connections ({error!r})") from error

    def _prepare(self, account: Account | None) -> None:
        """Sockets' directory, remains of a cut-off start, and programs that the account can run."""
        shutil.rmtree(self._sockets, ignore_errors=True)
        self._sockets.mkdir(mode=0o700)
        if account is None:
            return
        account.own(self._sockets)
        if not account.reaches(self._programs.initdb, self._programs.postgres):
            self._programs = self._programs.copy_to(self._workspace.runtime / "programs")

    async def _make_cluster(self, account: Account | None) -> None:
        # Under another name until it is complete: a directory called data is always a whole cluster.
        unfinished = self.directory / "data.new"
        shutil.rmtree(unfinished, ignore_errors=True)
        unfinished.mkdir(mode=0o700)
        if account is not None:
            account.own(unfinished)
        # The encoding and order are the same on every system with the built-in provider.
        locale = ["--encoding=UTF8", "--locale=C", "--locale-provider=builtin", "--builtin-locale=C.UTF-8"]
        where = self._data_argument(unfinished, account)
        options = ["-D", where, "-U", "postgres", "--auth=trust", "--no-instructions", *locale]
        if self._workspace.temporary:
            options.append("--no-sync")
        self._spawn([self._programs.initdb, *options], cwd=unfinished, account=account)
        process = self._process
        if not await wait_until(lambda: self.pid is None, INITDB_SECONDS):
            raise self._failure("took too long to make its data directory")
        self._process = None
        if process is None or process.returncode != 0:
            raise self._failure("could not make its data directory")
        unfinished.rename(self.data)
        _sync(self.directory)

    def _data_argument(self, data: Path, account: Account | None) -> str:
        if account is None or account.reaches(data):
            return str(data)
        if sys.platform == "linux":
            # The user may not pass through a parent of the data directory, such as /root. The server is
            # started inside it, and this name leads there without touching the parents.
            return "/proc/self/cwd"
        raise EmbeddedError(
            f"Postgres cannot run as root, and user {account.name} cannot reach {data}: "
            "choose a directory whose parents others may enter (chmod o+x), or start as a normal user"
        )

    def _address(self) -> dict[str, str]:
        return {
            "listen_addresses": "127.0.0.1" if self.port else "",
            "port": str(self.port or SOCKET_PORT),
            "unix_socket_directories": str(self._sockets),
        }

    def _write_access_rules(self) -> None:
        # The socket's directory is private to us and the server's user; TCP is open to everybody here.
        rules = "local all all trust\nlocal replication all trust\n"
        if self.port:
            rules += "host all all 127.0.0.1/32 scram-sha-256\n"
        (self.data / "pg_hba.conf").write_text(rules)

    def _refuse_foreign_server(self) -> None:
        try:
            pid = int((self.data / "postmaster.pid").read_text().splitlines()[0])
        except (OSError, ValueError, IndexError):
            return
        if keeper.works_in(pid, str(self.data.resolve())):
            raise EmbeddedError(f"process {pid}, which was not started here, serves {self.data}; stop it")

    async def _wait_until_ready(self) -> None:
        started = await wait_until(lambda: self.pid is None or self._status() == "ready", START_SECONDS)
        if self.pid is None:
            raise self._failure("ended during its start")
        if not started:
            raise self._failure("is not ready in time")

    def _status(self) -> str:
        try:
            return (self.data / "postmaster.pid").read_text().splitlines()[7].strip()
        except (OSError, IndexError):
            return ""


def _sync(directory: Path) -> None:
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
