"""What the tests of the embedded servers share: looking for processes, owners that die, clients."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil
from redis.asyncio import Redis

REPOSITORY = Path(__file__).parents[2]

OWNER = """
import asyncio, sys
from pathlib import Path
from buffer.embedded import EmbeddedServers

async def main():
    directory = Path(sys.argv[1]) if len(sys.argv) > 1 else None
    print("begin", flush=True)
    async with EmbeddedServers.start(directory) as servers:
        print(servers.directory, flush=True)
        print(servers.redis.pid, servers.postgres.pid, flush=True)
        sys.stdin.read()

asyncio.run(main())
"""


@contextmanager
def owner(temporary: Path, *arguments: str) -> Iterator[subprocess.Popen[str]]:
    """A process that owns embedded servers until its input ends; its temporary files are in one place."""
    process = subprocess.Popen(
        [sys.executable, "-c", OWNER, *arguments],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=REPOSITORY,
        env={**os.environ, "TMPDIR": str(temporary)},
    )
    with process:
        try:
            yield process
        finally:
            process.kill()


def line(process: subprocess.Popen[str]) -> str:
    """The next line that the owner prints."""
    assert process.stdout is not None
    text = process.stdout.readline().strip()
    assert text, process.stderr.read() if process.stderr else ""
    return text


def processes(*places: Path) -> list[psutil.Process]:
    """Processes that work in, or were started with, one of the places."""
    found = []
    for process in psutil.process_iter():
        if process.pid == os.getpid():
            continue
        with suppress(psutil.Error, OSError):
            words = [process.cwd(), *process.cmdline()]
            if any(str(place) in word for place in places for word in words):
                found.append(process)
    return found


def servers(*places: Path) -> list[psutil.Process]:
    """The same without the keepers."""
    found = []
    for process in processes(*places):
        with suppress(psutil.Error, OSError):
            if not any("keeper" in word for word in process.cmdline()):
                found.append(process)
    return found


def runs(pid: int) -> bool:
    """Whether a process exists, and not only because nobody has asked for its exit code."""
    with suppress(psutil.Error):
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    return False


def wait_for(condition: Callable[[], bool], seconds: float = 10) -> None:
    """Poll until the condition holds; fail after ``seconds``."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"not within {seconds} s"
        time.sleep(0.01)


async def command(url: str, *words: str, timeout: float = 5) -> object:
    """One Redis command on a connection of its own."""
    async with Redis.from_url(url, protocol=2, decode_responses=True, retry=None) as client:
        async with asyncio.timeout(timeout):
            return await client.execute_command(*words)
