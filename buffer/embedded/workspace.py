"""An owner's claim on a data directory, and its protection should the owner die.

Promises:

* at most one living process owns a directory; a second one gets a clear error;
* once open() has returned, no server of an earlier owner runs on the directory;
* when this process ends, however it ends, its servers are stopped and `runtime` is removed (keeper).

`runtime` is a short path for sockets, whose paths are limited to about 104 bytes.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import secrets
import shutil
import subprocess
import sys
import time
import weakref
from pathlib import Path
from typing import TYPE_CHECKING, Any

from buffer.embedded import keeper
from buffer.embedded.account import postgres_account
from buffer.errors import EmbeddedError

if TYPE_CHECKING:
    from collections.abc import Coroutine, Sequence

CLAIM_SECONDS = keeper.GRACE_SECONDS + 5.0
"""A keeper that is still stopping the servers of a dead owner holds the lock for about so long."""
FAREWELL_SECONDS = 5.0
SOCKET_PATH_BYTES = 104
LONGEST_SOCKET = "/pg/.s.PGSQL.65535.lock"

_open_workspaces: weakref.WeakSet[Workspace] = weakref.WeakSet()


async def finish(work: Coroutine[Any, Any, None]) -> None:
    """Run ``work``, which must be bounded, to its end even if the caller is cancelled meanwhile."""
    task = asyncio.ensure_future(work)
    cancelled = False
    while not task.done():
        try:
            await asyncio.shield(task)
        except asyncio.CancelledError:
            cancelled = True
    task.result()
    if cancelled:
        raise asyncio.CancelledError


class Workspace:
    """A directory that this process owns between open() and close().

    ``folders`` are the servers' data directories inside it ("" for the directory itself). Without a
    directory the data are temporary: they live in `runtime`.
    """

    def __init__(self, directory: Path | None, folders: Sequence[str]) -> None:
        self.runtime = _runtime_base() / f"buffer-{secrets.token_hex(6)}"
        self.temporary = directory is None
        self.directory = (self.runtime / "data" if directory is None else directory).absolute()
        self._folders = [self.directory / folder for folder in folders]
        self._descriptors: list[int] = []
        self._keeper: subprocess.Popen[bytes] | None = None
        self._pipe: int | None = None

    def guard(self, folder: Path) -> Path:
        """The guard file of the server whose data are in ``folder``."""
        return folder.resolve() / ".guard"

    async def open(self) -> None:
        """Claim the directory; EmbeddedError if another process has it."""
        _open_workspaces.add(self)
        try:
            # The keeper comes first: from here on, whatever we make is removed if we die.
            self._start_keeper()
            # As root, Postgres's user has to pass through; what is inside has its own permissions.
            mode = 0o711 if os.geteuid() == 0 else 0o700
            self.runtime.mkdir(mode)
            self.runtime.chmod(mode)
            _make(self.directory, mode)
            for folder in self._folders:
                _make(folder, mode)
            await self._claim()
            for folder in self._folders:
                await asyncio.to_thread(self._clear, self.guard(folder))
        except OSError as error:
            self.close()
            raise EmbeddedError(f"cannot use the directory {self.directory}: {error}") from error
        except BaseException:
            self.close()
            raise

    def inherit(self, folder: Path) -> int:
        """The descriptor of a locked guard, for a server to inherit. Locked until close()."""
        descriptor = os.open(self.guard(folder), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        self._descriptors.append(descriptor)
        if not keeper.try_lock(descriptor):
            raise EmbeddedError(f"another server runs on {folder}")
        return descriptor

    def close(self) -> None:
        """Give the directory up and remove the runtime directory. The servers must have ended."""
        shutil.rmtree(self.runtime, ignore_errors=True)
        if self._keeper is not None and self._pipe is not None:
            with contextlib.suppress(BrokenPipeError):
                os.write(self._pipe, b".")
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._keeper.wait(FAREWELL_SECONDS)
        self._keeper = None
        self.forget()

    def forget(self) -> None:
        """Close our files without touching what they stand for."""
        _open_workspaces.discard(self)
        for descriptor in self._descriptors:
            os.close(descriptor)
        self._descriptors.clear()
        if self._pipe is not None:
            os.close(self._pipe)
            self._pipe = None

    def _start_keeper(self) -> None:
        directory = self.directory.resolve()
        folders = [folder.resolve() for folder in self._folders]
        plan = {
            "lock": str(directory / ".lock"),
            "guards": [str(self.guard(folder)) for folder in folders],
            "runtime": str(self.runtime),
        }
        reading, self._pipe = os.pipe()
        try:
            self._keeper = subprocess.Popen(  # noqa: S603
                [sys.executable, "-I", "-S", keeper.__file__, json.dumps(plan)],
                stdin=reading,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                cwd="/",
                start_new_session=True,
            )
        finally:
            os.close(reading)

    async def _claim(self) -> None:
        descriptor = os.open(self.directory / ".lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        self._descriptors.append(descriptor)
        deadline = time.monotonic() + CLAIM_SECONDS
        while not keeper.try_lock(descriptor):
            owner = os.pread(descriptor, 20, 0).decode().strip()
            if _alive(owner) or time.monotonic() > deadline:
                raise EmbeddedError(f"{self.directory} is in use by process {owner or 'unknown'}")
            await asyncio.sleep(keeper.POLL_SECONDS)
        os.truncate(descriptor, 0)
        os.pwrite(descriptor, f"{os.getpid()}\n".encode(), 0)

    def _clear(self, guard: Path) -> None:
        if not keeper.sweep(str(guard)):
            raise EmbeddedError(
                f"a server of an earlier run still uses {guard.parent} and cannot be stopped; "
                f"processes: {keeper.holders(str(guard)) or 'not visible to this user'}"
            )


def _make(path: Path, mode: int) -> None:
    if not path.is_dir():
        path.mkdir(mode, parents=True)
        path.chmod(mode)  # mkdir's is subject to the umask


def _runtime_base() -> Path:
    """The first temporary directory with paths short enough, and reachable by Postgres's user."""
    account = postgres_account(Path("/nonexistent"))
    # Not tempfile.gettempdir(): it tries a file out, and an owner killed meanwhile would leave it behind.
    given = os.environ.get("TMPDIR")
    candidates = [Path(place).resolve() for place in (given, "/tmp", "/var/tmp") if place]  # noqa: S108
    for base in candidates:
        short = len(os.fsencode(base)) + len("/buffer-") + 12 + len(LONGEST_SOCKET) < SOCKET_PATH_BYTES
        if short and os.access(base, os.W_OK | os.X_OK) and (account is None or account.reaches(base)):
            return base
    raise EmbeddedError(
        f"none of {', '.join(map(str, candidates))} can hold the servers' sockets; set TMPDIR"
    )


def _alive(owner: str) -> bool:
    try:
        os.kill(int(owner), 0)
    except PermissionError:
        return True
    except (ProcessLookupError, ValueError):
        return False
    return True


def _forget_all() -> None:
    for workspace in list(_open_workspaces):
        workspace.forget()


# A forked worker must not keep locks, nor the pipe, alive after the owner's death.
os.register_at_fork(after_in_child=_forget_all)
