"""The suites, each on servers of its own."""

from __future__ import annotations

import gc
import time
import tracemalloc
from collections.abc import Awaitable, Callable, Sequence

import asyncpg
from redis.asyncio import Redis

from buffer.app.runtime import migrate_database
from buffer.bench.harness import (
    CALLERS,
    FLUSH_ROWS,
    PAYLOAD,
    Bench,
    Say,
    appender,
    drain,
    fill,
    p50_us,
    throughput,
)
from buffer.bench.reads import hits, read, views
from buffer.bench.report import Result, compare
from buffer.embedded import EmbeddedServers, find_redis_binary

BACKLOG = 500_000
MEMORY_ITEMS = 100_000
RETAINED_ITEMS = 50_000
_COLUMNS = ("tenant", "conversation", "position", "item_id", "created_at", "data")


async def append(bench: Bench) -> list[Result]:
    """Appends beside one XADD per append through the bare driver."""
    many: list[tuple[float, float]] = []
    one: list[tuple[float, float]] = []
    async with bench.buffer() as buffer, bench.redis() as redis:
        ours = appender(buffer, "a")
        streams = [f"bare:{n}" for n in range(bench.settings.shards)]

        async def bare(number: int) -> None:
            await redis.xadd(streams[number % len(streams)], {"d": PAYLOAD})

        for measured in range(bench.rounds + 1):
            bench.say(f"append: round {measured} of {bench.rounds}")
            bare_many, ours_many = await throughput(bare, 60), await throughput(ours, 60)
            bare_one, ours_one = await p50_us(bare, ours)
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
        await fill(full, BACKLOG, bench.say)
        with_backlog, without = appender(full, "b"), appender(empty, "b")
        for measured in range(bench.rounds + 1):
            bench.say(f"backlog: round {measured} of {bench.rounds}")
            full_us, empty_us = await p50_us(with_backlog, without)
            if measured:
                pairs.append((full_us, empty_us))
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


async def flush(bench: Bench) -> list[Result]:
    """From the stream to committed and trimmed, beside one plain COPY of the same rows."""
    pairs: list[tuple[float, float]] = []
    connection = await asyncpg.connect(bench.settings.postgres_url)
    try:
        for measured in range(bench.rounds + 1):
            bench.say(f"flush: round {measured} of {bench.rounds}")
            async with bench.buffer() as buffer:
                await fill(buffer, FLUSH_ROWS, lambda _: None)
            ours = await drain(bench)
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


async def memory(bench: Bench) -> list[Result]:
    """What an unflushed item costs in Redis beyond its payload, in memory and in the append-only file."""
    async with bench.buffer(name="memory") as buffer, bench.redis() as redis:
        before, aof_before = await _sizes(redis)
        await throughput(appender(buffer, "m"), MEMORY_ITEMS // CALLERS)
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
        with_copies, without = appender(kept, "r"), appender(not_kept, "n")
        for measured in range(2 * bench.rounds + 1):
            bench.say(f"retention: round {measured} of {2 * bench.rounds}")
            pair_many = (await throughput(with_copies, 40), await throughput(without, 40))
            kept_us, not_kept_us = await p50_us(with_copies, without)
            if measured:
                many.append(pair_many)
                one.append((kept_us, not_kept_us))
    async with bench.buffer(name="retained") as buffer:
        append = appender(buffer, "k")
        await throughput(append, 4)
        before = buffer.runtime.member.retention.turns
        tracemalloc.start()
        await throughput(append, RETAINED_ITEMS // CALLERS)
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
    "read": read,
    "views": views,
    "hits": hits,
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
