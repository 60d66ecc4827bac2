"""What happens to the servers of an owner that dies."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import asyncpg
import psutil
import pytest

from buffer.embedded import EmbeddedServers

from . import support

GONE_SECONDS = 10
QUIET_SECONDS = 0.3


def left(place: Path) -> list[object]:
    return [*support.processes(place), *place.iterdir()]


def wait_until_gone(place: Path) -> None:
    """Nothing is left for a while: a keeper that is just being forked is not visible at first."""
    since: float | None = None

    def quiet() -> bool:
        nonlocal since
        since = None if left(place) else since or time.monotonic()
        return since is not None and time.monotonic() - since > QUIET_SECONDS

    try:
        support.wait_for(quiet, GONE_SECONDS)
    except AssertionError:
        pytest.fail(f"left after {GONE_SECONDS} s: {left(place)}")


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_dead_owners_servers_and_directory_go_away(place: Path, number: signal.Signals) -> None:
    """An owner that dies at work takes everything with it within 10 s."""
    with support.owner(place) as process:
        support.line(process)
        directory = Path(support.line(process))
        support.line(process)
        assert len(support.processes(directory)) > 2
        process.send_signal(number)
        process.wait()
        wait_until_gone(place)


@pytest.mark.parametrize("after_seconds", [0.0, 0.01, 0.03, 0.06, 0.1, 0.15, 0.25, 0.35, 0.5, 0.7])
def test_owner_killed_during_start_up_leaves_nothing(place: Path, after_seconds: float) -> None:
    """At whatever moment of its start an owner dies, everything is gone within 10 s."""
    with support.owner(place) as process:
        support.line(process)
        with pytest.raises(AssertionError):  # the pause is the moment under test, not a wait for something
            support.wait_for(lambda: False, after_seconds)
        process.kill()
        process.wait()
        wait_until_gone(place)


def test_paused_servers_of_a_dead_owner_go_away(place: Path) -> None:
    """Servers that stand still are ended as well."""
    with support.owner(place) as process:
        support.line(process)
        directory = Path(support.line(process))
        support.line(process)
        for server in support.servers(directory):
            server.suspend()
        process.kill()
        process.wait()
        wait_until_gone(place)


async def test_next_owner_continues_after_a_crash(place: Path) -> None:
    """A directory whose owner was killed can be taken over at once, with its data."""
    data = place / "data"
    for attempt in range(3):
        with support.owner(place, str(data)) as process:
            support.line(process)
            support.line(process)
            support.line(process)
            process.kill()
            process.wait()
        async with EmbeddedServers.start(data) as servers:
            assert await support.command(servers.redis.url, "INCR", "attempts") == attempt + 1


async def test_next_owner_ends_servers_that_no_keeper_ended(place: Path) -> None:
    """If the keeper died too, the next owner stops what still runs on its directory, and starts."""
    data = place / "data"
    with support.owner(place, str(data)) as process:
        support.line(process)
        support.line(process)
        pids = [int(pid) for pid in support.line(process).split()]
        for child in psutil.Process(process.pid).children():
            if child.pid not in pids:
                child.kill()
        process.kill()
        process.wait()
    assert all(support.runs(pid) for pid in pids)
    async with EmbeddedServers.start(data) as servers:
        assert not any(support.runs(pid) for pid in pids)
        connection = await asyncpg.connect(servers.postgres.url)
        assert await connection.fetchval("SELECT 1") == 1
        await connection.close()


def test_interrupt_of_the_terminal_reaches_the_owner_only(place: Path) -> None:
    """Servers and keeper are in sessions of their own."""
    with support.owner(place) as process:
        support.line(process)
        support.line(process)
        pids = [int(pid) for pid in support.line(process).split()]
        children = [child.pid for child in psutil.Process(process.pid).children()]
        assert set(pids) < set(children)
        assert os.getsid(process.pid) not in {os.getsid(pid) for pid in children}


def test_forked_worker_does_not_keep_a_dead_owners_servers(place: Path) -> None:
    """A worker that the owner forked holds neither the locks nor the keeper's pipe."""
    forking = support.OWNER.replace(
        "sys.stdin.read()",
        """
        import multiprocessing, time
        worker = multiprocessing.get_context("fork").Process(target=time.sleep, args=(60,))
        worker.start()
        print(worker.pid, flush=True)
        sys.stdin.read()""",
    )
    worker = None
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(support, "OWNER", forking)
        with support.owner(place) as process:
            for _ in range(3):
                support.line(process)
            worker = psutil.Process(int(support.line(process)))
            process.kill()
            try:
                support.wait_for(lambda: not list(place.iterdir()), GONE_SECONDS)
                assert worker.is_running()
            finally:
                worker.kill()
