"""A server process: start, stop, kill, pause and resume, as pids and not as an event loop's children.

Event loops come and go while a server runs (each test has its own), so nothing here depends on one:
waiting is polling with a deadline. A server runs in a session of its own, so that an interrupt from
the terminal reaches its owner only, who then has the time to flush.

Postgres puts every backend into a session of its own as well. The processes of a server are therefore
found by the guard file that all of them inherit (see keeper), and not by group.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
import signal
import socket
import subprocess
import time
from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, Self

from buffer.embedded import keeper
from buffer.embedded.workspace import Workspace, finish
from buffer.errors import EmbeddedError

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from pathlib import Path
    from types import TracebackType

    from buffer.embedded.account import Account

POLL_SECONDS = 0.003
STOP_SECONDS = 10.0
KILL_SECONDS = 10.0
LOG_MAX_BYTES = 10 * 1024 * 1024
LOG_TAIL_BYTES = 2_000


class Server(ABC):
    """One server on one directory. Its address stays the same over kill, stop and restart."""

    name: str

    def __init__(self, directory: Path, folder: str = "", workspace: Workspace | None = None) -> None:
        self._workspace = workspace or Workspace(directory, [folder])
        self._owns_workspace = workspace is None
        self.directory = (self._workspace.directory / folder).absolute()
        self._process: subprocess.Popen[bytes] | None = None
        self._guard: int | None = None
        self._log_start = 0

    @property
    def pid(self) -> int | None:
        """The server's first process, None while it does not run."""
        process = self._process
        return process.pid if process is not None and process.poll() is None else None

    @property
    def log(self) -> Path:
        """Where the server writes its log."""
        return self.directory / f"{self.name}.log"

    async def __aenter__(self) -> Self:
        await self.start()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await finish(self.close())

    async def start(self) -> None:
        """Start and wait until it serves; EmbeddedError with the end of its log otherwise."""
        if self.pid is not None:
            raise EmbeddedError(f"{self.name} is running already")
        if self._guard is None:
            if self._owns_workspace:
                await self._workspace.open()
            self._guard = self._workspace.inherit(self.directory)
        try:
            await self.kill()
            await self._launch()
        except OSError as error:
            await finish(self.kill())
            raise EmbeddedError(f"{self.name} could not be started: {error}") from error
        except BaseException:
            await finish(self.kill())
            raise

    async def restart(self) -> None:
        """Start again after stop() or kill(): same directory, same address."""
        await self.start()

    async def kill(self) -> None:
        """SIGKILL every process of the server; returns when all are gone."""
        deadline = time.monotonic() + KILL_SECONDS
        killed = self.pid is not None
        # The first process goes first: it starts the others.
        self._send(signal.SIGKILL)
        while (rest := self._rest()) or self.pid is not None:
            for pid in rest:
                keeper.send(pid, signal.SIGKILL)
            if time.monotonic() > deadline:
                raise EmbeddedError(f"{self.name}: processes {rest or [self.pid]} survive SIGKILL")
            await asyncio.sleep(POLL_SECONDS)
        self._process = None
        if killed:
            self._killed()

    async def close(self) -> None:
        """Stop, and give the directory up."""
        try:
            await self.stop()
        finally:
            if self._owns_workspace:
                await asyncio.to_thread(self._workspace.close)
                self._guard = None

    @abstractmethod
    async def stop(self) -> None:
        """Stop cleanly, within a bound; by force after it."""

    def pause(self) -> None:
        """SIGSTOP every process of the server: it keeps its connections and answers nothing."""
        self._send(signal.SIGSTOP)
        stopped: set[int] = set()
        while rest := set(self._rest()) - stopped:
            for pid in rest:
                keeper.send(pid, signal.SIGSTOP)
            stopped |= rest

    def resume(self) -> None:
        """Let a paused server go on."""
        for pid in self._rest():
            keeper.send(pid, signal.SIGCONT)
        self._send(signal.SIGCONT)

    @abstractmethod
    async def _launch(self) -> None:
        """Prepare the directory, start the process, wait until it serves."""

    def _killed(self) -> None:  # noqa: B027 - not every server leaves something behind
        """Clean up what a killed server could not."""

    async def _stop(self, number: signal.Signals) -> None:
        if self.pid is not None:
            self.resume()
            self._send(number)
            await wait_until(lambda: self.pid is None, STOP_SECONDS)
        await self.kill()

    def _spawn(self, argv: Sequence[str | Path], *, cwd: Path, account: Account | None = None) -> None:
        if self._guard is None:
            raise EmbeddedError(f"{self.name} has no directory; start() it first")
        self.log.touch(mode=0o600)
        with self.log.open("ab") as log:
            if log.tell() > LOG_MAX_BYTES:
                log.truncate(0)
            self._log_start = log.tell()
            self._process = spawn(argv, cwd=cwd, account=account, output=log.fileno(), guard=self._guard)

    def _refuse_if_running(self, verb: str) -> None:
        if self.pid is not None:
            raise EmbeddedError(f"{self.name} is running: stop it before you {verb} it")

    def _send(self, number: signal.Signals) -> None:
        pid = self.pid
        if pid is not None:
            keeper.send(pid, number)

    def _rest(self) -> list[int]:
        """Every process of the server but the first."""
        if self._guard is None:
            return []
        found = keeper.holders(str(self._workspace.guard(self.directory)))
        first = self.pid
        return [pid for pid in found if pid != first]

    def _failure(self, what: str) -> EmbeddedError:
        tail = b""
        with contextlib.suppress(OSError), self.log.open("rb") as log:
            log.seek(max(self._log_start, self.log.stat().st_size - LOG_TAIL_BYTES))
            tail = log.read()
        said = tail.decode(errors="replace").strip() or "nothing"
        return EmbeddedError(f"{self.name} {what}; its log {self.log} ends with:\n{said}")


def spawn(
    argv: Sequence[str | Path], *, cwd: Path, account: Account | None, output: int, guard: int
) -> subprocess.Popen[bytes]:
    """Start a process that inherits the guard, in a session of its own, with private files."""
    return subprocess.Popen(  # noqa: S603
        [str(word) for word in argv],
        cwd=cwd,
        env=_environment(),
        stdin=subprocess.DEVNULL,
        stdout=output,
        stderr=output,
        pass_fds=(guard,),
        start_new_session=True,
        umask=0o077,
        user=account.uid if account else None,
        group=account.gid if account else None,
        extra_groups=[] if account else None,
    )


def _environment() -> Mapping[str, str]:
    # Of ours only PATH: PGDATA, PGOPTIONS and the like would change what is started. A given TZ spares
    # initdb a search through all time zones.
    return {"PATH": os.environ.get("PATH", os.defpath), "LC_ALL": "C", "TZ": "UTC"}


async def wait_until(condition: Callable[[], bool], seconds: float) -> bool:
    """Poll until the condition holds; False if it does not within ``seconds``."""
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            return False
        await asyncio.sleep(POLL_SECONDS)
    return True


def free_port() -> int:
    """A TCP port of the loopback interface that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def remove_except(directory: Path, kept: set[str]) -> None:
    """Empty a directory but for the names in ``kept``."""
    for path in directory.iterdir():
        if path.name in kept:
            continue
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()
