"""A Redis or Valkey server on a directory, with the project's redis.conf.

Promises: it runs with that file and nothing but the stated differences; start() returns once it has
loaded its data and answers; what it acknowledged is in its append-only file as the file's settings say.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import signal
import time
from typing import TYPE_CHECKING
from urllib.parse import quote

from buffer.embedded.binaries import find_redis_binary, find_redis_conf
from buffer.embedded.process import POLL_SECONDS, Server, free_port, remove_except

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from buffer.embedded.workspace import Workspace

ANSWER_SECONDS = 15.0
"""How long a started server may take until it answers at all."""
LOADING_SECONDS = 600.0
"""How long it may then load its data: about 50 GB at 100 MB/s."""
PING_SECONDS = 1.0
KEPT_BY_WIPE = {"redis.conf", "redis.log", ".guard", ".lock"}


class RedisServer(Server):
    """One Redis or Valkey process.

    ``config`` replaces directives of redis.conf by name (``{"appendfsync": "always"}``; every line of
    a directive that repeats); it may be changed between two starts.
    """

    name = "redis"

    def __init__(
        self,
        directory: Path,
        *,
        binary: Path | None = None,
        config: Mapping[str, str] | None = None,
        tcp: bool = False,
        password: str | None = None,
        folder: str = "",
        workspace: Workspace | None = None,
    ) -> None:
        super().__init__(directory, folder, workspace)
        self.config = dict(config or {})
        self.binary = binary or find_redis_binary(prefer_path=False)
        # requirepass has no effect beside an ACL line for the default user.
        self.password = password or self.config.pop("requirepass", None)
        self.port = free_port() if tcp else None
        self._socket = self._workspace.runtime / "redis.sock"

    @property
    def url(self) -> str:
        """Where to connect, as redis-py takes it."""
        secret = f":{quote(self.password, safe='')}@" if self.password else ""
        if self.port is None:
            return f"unix://{secret}{self._socket}"
        return f"redis://{secret}127.0.0.1:{self.port}"

    async def stop(self) -> None:
        """SIGTERM, which writes and syncs the append-only file; SIGKILL if that takes over 10 s."""
        await self._stop(signal.SIGTERM)

    def wipe(self) -> None:
        """Remove its data. It must not be running."""
        self._refuse_if_running("wipe")
        remove_except(self.directory, KEPT_BY_WIPE)

    async def _launch(self) -> None:
        conf = self.directory / "redis.conf"
        conf.touch(mode=0o600)
        conf.write_text(render(find_redis_conf().read_text(), {**self._own_config(), **self.config}))
        self._socket.unlink(missing_ok=True)
        self._spawn([self.binary, conf], cwd=self.directory)
        await self._wait_until_loaded()

    def _own_config(self) -> dict[str, str]:
        own = {"dir": _quoted(str(self.directory)), "daemonize": "no", "logfile": "", "pidfile": ""}
        if self.port is None:
            own |= {"port": "0", "unixsocket": _quoted(str(self._socket)), "unixsocketperm": "600"}
        else:
            own |= {"port": str(self.port), "bind": "127.0.0.1"}
        if self.password:
            digest = hashlib.sha256(self.password.encode()).hexdigest()
            own["user"] = f"default on #{digest} ~* &* +@all -flushall -flushdb"
        return own

    async def _wait_until_loaded(self) -> None:
        deadline = time.monotonic() + ANSWER_SECONDS
        loading_deadline = time.monotonic() + LOADING_SECONDS
        answer = b"no answer"
        while time.monotonic() < deadline:
            if self.pid is None:
                raise self._failure("ended during its start")
            with contextlib.suppress(OSError, TimeoutError):
                answer = await asyncio.wait_for(self._ping(), PING_SECONDS)
                # A replica without its primary answers so; it serves all the same.
                if answer.startswith((b"+PONG", b"-MASTERDOWN")):
                    return
                if answer.startswith(b"-LOADING"):
                    deadline = min(time.monotonic() + ANSWER_SECONDS, loading_deadline)
            await asyncio.sleep(POLL_SECONDS)
        raise self._failure(f"does not serve ({answer.decode(errors='replace').strip()})")

    async def _ping(self) -> bytes:
        if self.port is None:
            reader, writer = await asyncio.open_unix_connection(self._socket)
        else:
            reader, writer = await asyncio.open_connection("127.0.0.1", self.port)
        try:
            if self.password:
                writer.write(_command("AUTH", self.password))
                await reader.readline()
            writer.write(_command("PING"))
            return await reader.readline()
        finally:
            writer.close()
            with contextlib.suppress(OSError):
                await writer.wait_closed()


def render(conf: str, config: Mapping[str, str]) -> str:
    """``conf`` with the directives in ``config`` in place of its own.

    Written out and not given as arguments, because a second ``user default`` line is an error, and
    because a server that rewrites its configuration needs one file.
    """
    kept = [line for line in conf.splitlines() if line.split(" ", 1)[0].lower() not in config]
    empty = '""'
    added = [f"{name} {value or empty}" for name, value in config.items()]
    return "\n".join([*kept, *added, ""])


def _quoted(value: str) -> str:
    escaped = value.replace("\\", "\\\\").replace('"', '\\"')
    return f'"{escaped}"'


def _command(*words: str) -> bytes:
    parts = [word.encode() for word in words]
    return b"*%d\r\n" % len(parts) + b"".join(b"$%d\r\n%s\r\n" % (len(part), part) for part in parts)
