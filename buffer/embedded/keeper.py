"""The keeper: ends embedded servers whose owner died without ending them.

Run as a script beside every owner, with a plan as its only argument and a pipe from the owner as its
input. One byte on the pipe is a farewell: the owner has cleaned up, nothing is left to do. The end of
the pipe without it means that the owner is gone, at whatever point of its life; then the keeper

1. takes the directory's lock, and leaves the servers alone if somebody else already took it over,
2. stops every process that holds one of the plan's guard files open,
3. removes the owner's runtime directory, and with it the data if they were temporary.

A guard is a file that the owner locks and that a server inherits, still locked, at the moment of the
fork. So the servers can be found without pid files, and there is no instant at which one exists and
can't be found.

Only the standard library is used here, and nothing else of this package: the keeper starts in
isolated mode, and has to be up in a few milliseconds.
"""

# pathlib would more than double the keeper's imports.
# ruff: noqa: PTH112, PTH115, PTH118, PTH120, PTH123, PTH208

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import signal
import subprocess
import sys
import time
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator

GRACE_SECONDS = 5.0
"""How long a server may take to end by itself before it is killed."""
LOCK_SECONDS = 1.0
SWEEP_SECONDS = 9.0
"""When to give up on a guard whose holders can't be found or killed."""
POLL_SECONDS = 0.02


def holders(guard: str) -> list[int]:
    """The processes outside this one's session that hold the file ``guard`` (a real path) open.

    This session is left out because a child that some other thread is just starting shares all of
    our files until it has replaced its program.
    """
    found = _holders_by_proc(guard) if os.path.isdir("/proc/self/fd") else _holders_by_lsof(guard)
    ours = os.getsid(0)
    return [pid for pid in found if _session(pid) not in (ours, None)]


def _holders_by_proc(guard: str) -> Iterator[int]:
    targets = {guard, guard + " (deleted)"}
    for name in os.listdir("/proc"):
        if not name.isdigit():
            continue
        if any(target in targets for target in _open_files(f"/proc/{name}/fd")):
            yield int(name)


def _open_files(folder: str) -> list[str]:
    targets = []
    # Processes end while we look, and other users' can't be looked into.
    with contextlib.suppress(OSError):
        for descriptor in os.listdir(folder):
            with contextlib.suppress(OSError):
                targets.append(os.readlink(f"{folder}/{descriptor}"))
    return targets


def _holders_by_lsof(guard: str) -> Iterator[int]:
    command = ["/usr/sbin/lsof", "-t", "--", guard]
    output = subprocess.run(command, capture_output=True, text=True, check=False).stdout  # noqa: S603
    yield from (int(line) for line in output.split())


def _session(pid: int) -> int | None:
    try:
        return os.getsid(pid)
    except PermissionError:  # macOS refuses to tell for another user's
        return -1
    except OSError:
        return None


def works_in(pid: int, directory: str) -> bool:
    """Whether a process's working directory is ``directory`` (a real path)."""
    if os.path.isdir("/proc/self/fd"):
        try:
            return os.readlink(f"/proc/{pid}/cwd") == directory
        except OSError:
            return False
    command = ["/usr/sbin/lsof", "-a", "-p", str(pid), "-d", "cwd", "-Fn"]
    output = subprocess.run(command, capture_output=True, text=True, check=False).stdout  # noqa: S603
    return f"n{directory}" in output.splitlines()


def send(pid: int, number: signal.Signals) -> None:
    """Signal a process that may be gone."""
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, number)


def try_lock(descriptor: int) -> bool:
    """Take the lock on an open file, if nobody has it."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in (errno.EWOULDBLOCK, errno.EACCES):
            return False
        raise
    return True


def sweep(guard: str, *, grace_seconds: float = GRACE_SECONDS) -> bool:
    """Stop whatever holds ``guard``: politely first, by force after the grace. True if it is free."""
    try:
        descriptor = os.open(guard, os.O_RDWR | os.O_CLOEXEC)
    except FileNotFoundError:
        return True
    try:
        started = time.monotonic()
        asked: set[int] = set()
        while not try_lock(descriptor):
            elapsed = time.monotonic() - started
            if elapsed > grace_seconds + SWEEP_SECONDS:
                return False
            _end(holders(guard), asked, force=elapsed > grace_seconds)
            time.sleep(POLL_SECONDS)
        if asked:
            release_shared_memory(os.path.join(os.path.dirname(guard), "data", "postmaster.pid"))
        return True
    finally:
        os.close(descriptor)


def _end(pids: list[int], asked: set[int], *, force: bool) -> None:
    if force:
        for pid in pids:
            send(pid, signal.SIGKILL)
        return
    for pid in pids:
        send(pid, signal.SIGCONT)
    # An interrupt is a clean stop for both servers, but only if their first process gets it, and for
    # Redis only if it gets no second one.
    parents = _parents(pids)
    for pid in pids:
        if pid not in asked and parents.get(pid) not in pids:
            asked.add(pid)
            send(pid, signal.SIGINT)


def _parents(pids: list[int]) -> dict[int, int]:
    if not pids:
        return {}
    if os.path.isdir("/proc/self/fd"):
        return dict(_parents_by_proc(pids))
    command = ["/bin/ps", "-o", "pid=,ppid=", "-p", ",".join(map(str, pids))]
    output = subprocess.run(command, capture_output=True, text=True, check=False).stdout  # noqa: S603
    return {int(pid): int(parent) for pid, parent in map(str.split, output.splitlines())}


def _parents_by_proc(pids: list[int]) -> Iterator[tuple[int, int]]:
    for pid in pids:
        with contextlib.suppress(OSError), open(f"/proc/{pid}/stat", encoding="latin-1") as stat:
            # pid (name) state parent: the name may hold anything, brackets too.
            yield pid, int(stat.read().rpartition(")")[2].split()[1])


def release_shared_memory(pid_file: str) -> None:
    """Give back the System V segment that a killed postmaster leaves behind.

    It outlives every process, and a system has few of them (32 on macOS). Call it only after having
    killed that very postmaster: after a reboot the number in the file may be somebody else's.
    """
    try:
        with open(pid_file, encoding="utf-8") as lines:
            segment = int(lines.read().splitlines()[6].split()[1])
    except (OSError, IndexError, ValueError):
        return
    import ctypes  # noqa: PLC0415 - seldom needed, and slow to import

    remove = 0  # IPC_RMID
    ctypes.CDLL(None).shmctl(segment, remove, None)


def take_lock(path: str, seconds: float) -> int | None:
    """Open and lock the file ``path`` within ``seconds``; its descriptor, or None."""
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_CLOEXEC)
    except OSError:
        return None
    deadline = time.monotonic() + seconds
    while not try_lock(descriptor):
        if time.monotonic() > deadline:
            os.close(descriptor)
            return None
        time.sleep(POLL_SECONDS)
    return descriptor


def main() -> int:
    """Wait for the owner's farewell or death."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    plan = json.loads(sys.argv[1])
    if os.read(0, 1):
        return 0
    lock = take_lock(plan["lock"], LOCK_SECONDS)
    if lock is not None:
        for guard in plan["guards"]:
            sweep(guard)
    import shutil  # noqa: PLC0415 - only now, so that the start is quick

    shutil.rmtree(plan["runtime"], ignore_errors=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
