"""Servers, workloads and clocks that the suites share."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from statistics import median
from typing import Any
from urllib.parse import urlsplit

# The baselines are the bare drivers, so this is the one package besides `stream` and `store` with them.
import asyncpg
import msgspec
from redis.asyncio import Redis

from buffer.app.buffer import Buffer
from buffer.app.runtime import Runtime, migrate_database
from buffer.embedded import EmbeddedServers
from buffer.settings import Settings

CONVERSATIONS = 1_000
CALLERS = 256
ITEM = {"role": "user", "content": "x" * 363}
PAYLOAD = msgspec.json.encode(ITEM)  # 400 bytes
FLUSH_ROWS = 100_000
_UNLIMITED = 1 << 40
_TURN = 20

Say = Callable[[str], None]
Call = Callable[[int], Awaitable[Any]]


class Bench:
    """Servers and settings of one suite."""

    def __init__(self, servers: EmbeddedServers, rounds: int, say: Say) -> None:
        self.servers = servers
        self.rounds = rounds
        self.say = say
        self.settings = Settings.load(
            redis_url=servers.redis.url,
            postgres_url=servers.postgres.url,
            append_timeout_seconds=30.0,
            flush_interval_seconds=0.1,
            # A backlog is what some suites are about.
            high_water_bytes=_UNLIMITED,
            retained_max_bytes=_UNLIMITED,
            redis_lost_seconds=10.0,
        )

    def with_settings(self, **changes: object) -> Bench:
        """The same with other settings."""
        other = Bench(self.servers, self.rounds, self.say)
        other.settings = self.settings.model_copy(update=changes)
        return other

    @asynccontextmanager
    async def buffer(self, *, flusher: bool = False, name: str = "buffer") -> AsyncIterator[Buffer]:
        """A buffer whose shards are open in Redis; without ``flusher`` nothing is flushed.

        ``name``: of its key prefix and its database; one of another name shares nothing with it.
        """
        settings = await self._settings_for(name)
        if not flusher:
            async with Buffer.connect(settings, flusher=True):
                pass
        async with Buffer.connect(settings, flusher=flusher) as buffer:
            yield buffer

    async def _settings_for(self, name: str) -> Settings:
        url = self.servers.postgres.url
        own = urlsplit(url)._replace(path=f"/{name}").geturl()
        settings = self.settings.model_copy(update={"key_prefix": name, "postgres_url": own})
        connection = await asyncpg.connect(url)
        try:
            if not await connection.fetchval("select 1 from pg_database where datname = $1", name):
                await connection.execute(f'create database "{name}"')
        finally:
            await connection.close()
        await migrate_database(settings)
        return settings

    @asynccontextmanager
    async def redis(self) -> AsyncIterator[Redis]:
        """The bare driver, with a pool of as many connections as there are callers."""
        client = Redis.from_url(self.settings.redis_url, max_connections=CALLERS, protocol=2)
        try:
            yield client
        finally:
            await client.aclose()


async def throughput(call: Call, each: int, callers: int = CALLERS) -> float:
    """Calls a second of concurrent callers, each with so many calls."""

    async def caller(first: int) -> None:
        for number in range(first, first + each):
            await call(number)

    began = time.perf_counter()
    await asyncio.gather(*(caller(each * number) for number in range(callers)))
    return callers * each / (time.perf_counter() - began)


async def p50_us(*calls: Call, count: int = 1_000) -> list[float]:
    """Of each call the median of one caller, in us; they take turns, since machines change their speed."""
    seconds: list[list[float]] = [[] for _ in calls]
    for first in range(0, count, _TURN):
        for call, measured in zip(calls, seconds, strict=True):
            for number in range(first, first + _TURN):
                began = time.perf_counter()
                await call(number)
                measured.append(time.perf_counter() - began)
    return [median(measured) * 1e6 for measured in seconds]


def appender(buffer: Buffer, prefix: str) -> Call:
    """Calls of one item, spread over 1,000 conversations."""
    conversations = [buffer.conversation(f"{prefix}{n}") for n in range(CONVERSATIONS)]
    return lambda number: conversations[number * 7 % CONVERSATIONS].append(ITEM)


async def fill(buffer: Buffer, items: int, say: Say) -> None:
    """Call many items fast: batches of 100."""
    say(f"filling {items:,} items")
    conversations = [buffer.conversation(f"b{n}") for n in range(CONVERSATIONS)]
    batch = [ITEM] * 100

    async def worker(first: int) -> None:
        for number in range(first, items // 100, 16):
            await conversations[number * 7 % CONVERSATIONS].extend(batch)

    await asyncio.gather(*(worker(n) for n in range(16)))


async def drain(bench: Bench) -> float:
    """Rows a second from the first fetch until Redis has forgotten the last one."""
    async with Runtime.open(bench.settings, flusher=False, accepting=False) as runtime:
        backlogs = await runtime.shards.peek(range(bench.settings.shards))
        waiting = sum(backlog.turns for backlog in backlogs)
        async with runtime.flushing():  # its first claim was tried, and its first fetch comes next
            began = time.perf_counter()
            await runtime.flush()
            seconds = time.perf_counter() - began
    return waiting / seconds
