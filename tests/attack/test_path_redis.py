"""Redis dies, loses everything, stands still or goes back in time, while several processes append.

The service goes over to Postgres and back by itself; nothing acked is lost, doubled, moved or out of order,
and no read misses anything in between.
"""

from __future__ import annotations

import asyncio
import logging
import shutil
import time
from collections.abc import Awaitable, Callable

import asyncpg
import pytest
from redis.asyncio import Redis

from buffer import Buffer, Settings
from buffer.embedded import EmbeddedServers
from tests.support.processes import Commands
from tests.support.writers import Writers, running, settled

pytestmark = pytest.mark.attack

_log = logging.getLogger(__name__)

# The goal is 1.5 s on a machine that has nothing else to do.
LONGEST_SILENCE_SECONDS = 4.0
BACK_SECONDS = 8.0
STOPPED_SECONDS = 5.0

_CONFIG = {
    "wiped": {"appendonly": "no"},
    "flushed": {"user": "default on nopass ~* &* +@all"},  # the project's own forbids FLUSHALL
}


@pytest.fixture
async def switching(own_servers: EmbeddedServers, own_settings: Settings, how: str) -> Settings:
    """Settings that give Redis up quickly, and a Redis that allows what is to be done to it."""
    if how in _CONFIG:
        await own_servers.redis.stop()
        own_servers.redis.config |= _CONFIG[how]
        await own_servers.redis.restart()
    changes = {"redis_lost_seconds": 0.7, "flush_interval_seconds": 0.3}
    return own_settings.model_copy(update=changes)


class Outage:
    """What happens to Redis, and when."""

    def __init__(self, servers: EmbeddedServers, writers: Writers, buffer: Buffer) -> None:
        self.redis = servers.redis
        self.writers = writers
        self.buffer = buffer
        self.began = self.direct = self.ended = 0.0
        self.found: list[str] = []

    async def run(self, how: str) -> None:
        """Lose Redis in one of the ways below, until it serves again."""
        self.began = time.monotonic()
        happen: Callable[[], Awaitable[None]] = getattr(self, how)
        await happen()
        self.ended = time.monotonic()

    async def in_direct(self) -> None:
        """Everybody appends directly, and reads through another process are whole."""
        self.direct = await self.writers.acking("direct", since=self.began)
        self.found += await self.writers.unread(self.buffer)

    async def killed(self) -> None:
        """SIGKILL; it comes back with its append-only file."""
        await self.redis.kill()
        await self.in_direct()
        await self.redis.restart()

    async def wiped(self) -> None:
        """SIGKILL without persistence; it comes back empty."""
        await self.redis.kill()
        await self.in_direct()
        self.redis.wipe()
        await self.redis.restart()

    async def stopped(self) -> None:
        """SIGSTOP: connections stay open, nothing is answered, until it goes on where it was."""
        self.redis.pause()
        await self.in_direct()
        await asyncio.sleep(max(0.0, self.began + STOPPED_SECONDS - time.monotonic()))  # as the attack says
        self.redis.resume()

    async def flushed(self) -> None:
        """FLUSHALL: the server is there all the time, its data is gone."""
        async with Redis.from_url(self.redis.url, protocol=2) as client:
            await client.flushall()

    async def older(self) -> None:
        """SIGKILL; it comes back with what it held some time before."""
        files = self.redis.directory / "appendonlydir"
        copy = files.with_name("copy")
        shutil.copytree(files, copy)
        await self.writers.acking("stream")  # of which the copy knows nothing
        self.began = time.monotonic()
        await self.redis.kill()
        await self.in_direct()
        shutil.rmtree(files)
        copy.rename(files)
        await self.redis.restart()

    async def restarted(self) -> None:
        """SIGKILL, and back at once: most processes see only a connection that broke."""
        await self.redis.kill()
        await self.redis.restart()


@pytest.mark.parametrize("how", ["killed", "wiped", "stopped", "flushed", "older", "restarted"])
async def test_redis_lost_under_load_loses_doubles_and_inverts_nothing(
    own_servers: EmbeddedServers, switching: Settings, commands: Commands, how: str
) -> None:
    """Three processes at 1,000 appends/s go over to Postgres and return, with one order and whole reads."""
    async with running(commands, switching) as (writers, buffer):
        outage = Outage(own_servers, writers, buffer)
        await outage.run(how)
        back = await writers.acking("stream", since=outage.ended, seconds=BACK_SECONDS)
        await writers.at_pace()
        silence = writers.longest_silence(outage.began, time.monotonic())
        await writers.stop()
        _log.info("%s: no ack for %.2f s, back after %.2f s", how, silence, back - outage.ended)
        _log.info("%s: %s", how, writers.summary())
        assert silence < LONGEST_SILENCE_SECONDS
        assert not outage.found
        _check_outage(writers, outage, how)
        await settled(buffer)
        postgres = await asyncpg.connect(switching.postgres_url)
        assert not await writers.violations(buffer, postgres)
        assert await postgres.fetchval("select count(*) from buffer.dead_letters") == 0
        assert await postgres.fetchval("select count(*) from buffer.losses") == 0
        assert await postgres.fetchval("select count(*) from buffer.incarnations where store = 'redis'")
        await postgres.close()
    # Each would cost everybody a second.
    assert "deadlock" not in own_servers.postgres.log.read_text()


def _check_outage(writers: Writers, outage: Outage, how: str) -> None:
    """While Redis is away receipts are of the direct path, and reads are complete all the time."""
    assert all(read.complete for read in writers.reads() if read.kind == "read")
    if how in {"flushed", "restarted"}:
        return  # it was back before anybody missed it
    away = writers.acks(since=outage.began, until=outage.ended)
    first: dict[str, float] = {}
    for ack in away:
        if ack.path == "direct":
            first.setdefault(ack.conversation, ack.at)
    assert first
    late = [ack for ack in away if ack.path == "stream" and ack.at > first.get(ack.conversation, ack.at)]
    assert not late, f"Redis was away: {late[:3]}"
    failed = writers.failed(since=outage.direct, until=outage.ended)
    assert len(failed) <= 0.02 * len(away), f"somebody still waits for Redis: {failed[:3]}"
