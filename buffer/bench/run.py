"""The suites, each on servers of its own."""

from __future__ import annotations

import asyncio
import gc
import time
import tracemalloc
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from statistics import median
from typing import Any
from urllib.parse import urlsplit

# The baselines are the bare drivers, so this is the one module besides `stream` and `store` with them.
import asyncpg
import msgspec
from redis.asyncio import Redis

from buffer.app.buffer import Buffer
from buffer.app.runtime import Runtime, migrate_database
from buffer.bench.report import Result, compare
from buffer.embedded import EmbeddedServers, find_redis_binary
from buffer.settings import Settings

CONVERSATIONS = 1_000
CALLERS = 256
ITEM = {"role": "user", "content": "x" * 363}
PAYLOAD = msgspec.json.encode(ITEM)  # 400 bytes
BACKLOG = 500_000
FLUSH_ROWS = 100_000
MEMORY_ITEMS = 100_000
RETAINED_ITEMS = 50_000
_UNLIMITED = 1 << 40
_COLUMNS = ("tenant", "conversation", "position", "item_id", "created_at", "data")

Say = Callable[[str], None]


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


Append = Callable[[int], Awaitable[Any]]


async def _throughput(append: Append, each: int) -> float:
    async def caller(first: int) -> None:
        for number in range(first, first + each):
            await append(number)

    began = time.perf_counter()
    await asyncio.gather(*(caller(each * number) for number in range(CALLERS)))
    return CALLERS * each / (time.perf_counter() - began)


async def _p50_us(append: Append, count: int) -> float:
    seconds = []
    for number in range(count):
        began = time.perf_counter()
        await append(number)
        seconds.append(time.perf_counter() - began)
    return median(seconds) * 1e6


def _append_to(buffer: Buffer, prefix: str) -> Append:
    conversations = [buffer.conversation(f"{prefix}{n}") for n in range(CONVERSATIONS)]
    return lambda number: conversations[number * 7 % CONVERSATIONS].append(ITEM)


async def append(bench: Bench) -> list[Result]:
    """Appends beside one XADD per append through the bare driver."""
    many: list[tuple[float, float]] = []
    one: list[tuple[float, float]] = []
    async with bench.buffer() as buffer, bench.redis() as redis:
        ours = _append_to(buffer, "a")
        streams = [f"bare:{n}" for n in range(bench.settings.shards)]

        async def bare(number: int) -> None:
            await redis.xadd(streams[number % len(streams)], {"d": PAYLOAD})

        for measured in range(bench.rounds + 1):
            bench.say(f"append: round {measured} of {bench.rounds}")
            bare_many, ours_many = await _throughput(bare, 60), await _throughput(ours, 60)
            bare_one, ours_one = await _p50_us(bare, 1_000), await _p50_us(ours, 1_000)
            if measured:  # the first one warms up
                many.append((ours_many, bare_many))
                one.append((ours_one, bare_one))
    return [
        compare(
            "256 callers",
            "appends/s",
            many,
            "one XADD per append, redis-py, pool of 256",
            target=4,
            goal=6,
            better="higher",
        ),
        compare("one caller p50", "us", one, "a bare redis-py XADD", target=1.75, goal=1.4, better="lower"),
    ]


async def backlog(bench: Bench) -> list[Result]:
    """An append with 500,000 items unflushed beside one with none."""
    pairs: list[tuple[float, float]] = []
    async with bench.buffer(name="full") as full, bench.buffer(name="empty") as empty:
        await _fill(full, BACKLOG, bench.say)
        with_backlog, without = _append_to(full, "b"), _append_to(empty, "b")
        for measured in range(bench.rounds + 1):
            bench.say(f"backlog: round {measured} of {bench.rounds}")
            pair = (await _p50_us(with_backlog, 1_000), await _p50_us(without, 1_000))
            if measured:
                pairs.append(pair)
    return [
        compare(
            f"append p50 with {BACKLOG:,} unflushed",
            "us",
            pairs,
            "the same with none",
            target=1.2,
            goal=None,
            better="lower",
        )
    ]


async def _fill(buffer: Buffer, items: int, say: Say) -> None:
    """Append many items fast: batches of 100."""
    say(f"filling {items:,} items")
    conversations = [buffer.conversation(f"b{n}") for n in range(CONVERSATIONS)]
    batch = [ITEM] * 100

    async def worker(first: int) -> None:
        for number in range(first, items // 100, 16):
            await conversations[number * 7 % CONVERSATIONS].extend(batch)

    await asyncio.gather(*(worker(n) for n in range(16)))


async def flush(bench: Bench) -> list[Result]:
    """From the stream to committed and trimmed, beside one plain COPY of the same rows."""
    pairs: list[tuple[float, float]] = []
    connection = await asyncpg.connect(bench.settings.postgres_url)
    try:
        for measured in range(bench.rounds + 1):
            bench.say(f"flush: round {measured} of {bench.rounds}")
            async with bench.buffer() as buffer:
                await _fill(buffer, FLUSH_ROWS, lambda _: None)
            ours = await _drain(bench)
            rows = [
                tuple(r)
                for r in await connection.fetch(
                    f"select {', '.join(_COLUMNS)} from buffer.items order by position"  # noqa: S608 - a constant
                )
            ]
            await connection.execute("truncate buffer.items")
            await connection.execute("checkpoint")
            began = time.perf_counter()
            await connection.copy_records_to_table(
                "items",
                schema_name="buffer",
                columns=_COLUMNS,
                records=rows,
            )
            baseline = len(rows) / (time.perf_counter() - began)
            await connection.execute("truncate buffer.items")
            await connection.execute("checkpoint")
            if measured:
                pairs.append((ours, baseline))
    finally:
        await connection.close()
    return [
        compare(
            "flush",
            "rows/s",
            pairs,
            f"one asyncpg COPY of the same {FLUSH_ROWS:,} rows",
            target=0.6,
            goal=0.8,
            better="higher",
        )
    ]


async def _drain(bench: Bench) -> float:
    """Rows a second from the first fetch until Redis has forgotten the last one."""
    async with Runtime.open(bench.settings, flusher=False, accepting=False) as runtime:
        backlogs = await runtime.shards.peek(range(bench.settings.shards))
        waiting = sum(backlog.turns for backlog in backlogs)
        async with runtime.flushing():  # its first claim was tried, and its first fetch comes next
            began = time.perf_counter()
            await runtime.flush()
            seconds = time.perf_counter() - began
    return waiting / seconds


async def memory(bench: Bench) -> list[Result]:
    """What an unflushed item costs in Redis beyond its payload, in memory and in the append-only file."""
    async with bench.buffer(name="memory") as buffer, bench.redis() as redis:
        before, aof_before = await _sizes(redis)
        await _throughput(_append_to(buffer, "m"), MEMORY_ITEMS // CALLERS)
        after, aof_after = await _sizes(redis)
    items = MEMORY_ITEMS // CALLERS * CALLERS
    over_memory = (after - before) / items - len(PAYLOAD)
    over_aof = (aof_after - aof_before) / items - len(PAYLOAD)
    return [
        Result(
            "Redis memory an item, beyond its payload",
            "bytes",
            over_memory,
            None,
            "",
            over_memory,
            250,
            None,
            "lower",
        ),
        Result("AOF an item, beyond its payload", "bytes", over_aof, None, "", over_aof, 450, None, "lower"),
    ]


async def retention(bench: Bench) -> list[Result]:
    """Appends that are retained beside the same without, and what a retained item takes."""
    many: list[tuple[float, float]] = []
    one: list[tuple[float, float]] = []
    async with bench.buffer(flusher=True) as kept, bench.buffer() as not_kept:
        not_kept.runtime.coalescer._retain = lambda *_: None  # type: ignore[method-assign]  # noqa: SLF001
        with_copies, without = _append_to(kept, "r"), _append_to(not_kept, "n")
        for measured in range(2 * bench.rounds + 1):
            bench.say(f"retention: round {measured} of {2 * bench.rounds}")
            pair_many = (await _throughput(with_copies, 40), await _throughput(without, 40))
            pair_one = (await _p50_us(with_copies, 1_000), await _p50_us(without, 1_000))
            if measured:
                many.append(pair_many)
                one.append(pair_one)
    async with bench.buffer(name="retained") as buffer:
        append = _append_to(buffer, "k")
        await _throughput(append, 4)
        before = buffer.runtime.member.retention.turns
        tracemalloc.start()
        await _throughput(append, RETAINED_ITEMS // CALLERS)
        gc.collect()
        held = tracemalloc.get_traced_memory()[0]
        tracemalloc.stop()
        each = held / (buffer.runtime.member.retention.turns - before) - len(PAYLOAD)
    return [
        compare(
            "one caller p50", "us", one, "the same without retention", target=1.1, goal=None, better="lower"
        ),
        compare(
            "256 callers",
            "appends/s",
            many,
            "the same without retention",
            target=0.9,
            goal=None,
            better="higher",
        ),
        Result("held an item, beyond its payload", "bytes", each, None, "", each, 700, None, "lower"),
    ]


async def _sizes(redis: Redis) -> tuple[int, int]:
    info = {**await redis.info("memory"), **await redis.info("persistence")}
    return info["used_memory"], info["aof_current_size"]


SUITES: dict[str, Callable[[Bench], Awaitable[list[Result]]]] = {
    "append": append,
    "flush": flush,
    "memory": memory,
    "backlog": backlog,
    "retention": retention,
}


async def run_suites(names: Sequence[str], *, rounds: int, redis_from_path: bool, say: Say) -> list[Result]:
    """Run the named suites, each on fresh servers."""
    results: list[Result] = []
    binary = find_redis_binary(prefer_path=True) if redis_from_path else None
    for name in names:
        async with EmbeddedServers.start(
            redis_binary=binary, redis_config={"auto-aof-rewrite-percentage": "0"}, tcp=True
        ) as servers:
            bench = Bench(servers, rounds, say)
            await migrate_database(bench.settings)
            results += await SUITES[name](bench)
    return results
