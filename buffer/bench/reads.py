"""Suites for reads: beside a bare GET, beside Postgres, and what views cost those who append and flush."""

from __future__ import annotations

import asyncio
import itertools
import random
import time
from collections.abc import Awaitable, Callable
from datetime import UTC, datetime
from typing import Any

import asyncpg

from buffer.app.buffer import Buffer
from buffer.bench.harness import (
    FLUSH_ROWS,
    ITEM,
    PAYLOAD,
    Bench,
    appender,
    drain,
    fill,
    p50_us,
    throughput,
)
from buffer.bench.report import Result, compare
from buffer.store.items import NewConversation, Row, add_conversations, copy_rows

READERS = 64
TURNS = 20
HISTORY = 60
HIT_CONVERSATIONS = 10_000
HIT_READS = 250_000
HIT_HISTORY = 24
_ZIPF = 1.1
_LAST_20 = """
select position, item_id, created_at, data from buffer.items
where tenant = 'default' and conversation = $1 and data is not null order by position desc limit 20
"""
_LAST_20_SLOWLY = _LAST_20.replace("from buffer.items", "from pg_sleep(0.005), buffer.items")

Read = Callable[[int], Awaitable[Any]]


async def read(bench: Bench) -> list[Result]:
    """A warm context of 20 items beside a bare GET of the same bytes, and beside the same from Postgres."""
    pairs: dict[str, list[tuple[float, float]]] = {"one": [], "many": [], "sql": [], "slow": []}
    queries: list[int] = []
    async with bench.buffer(flusher=True) as buffer, bench.redis() as redis:
        names = [f"r{n}" for n in range(READERS)]
        for name in names:
            await buffer.conversation(name).extend([ITEM] * HISTORY)
        await buffer.flush()
        await redis.set("bare", PAYLOAD * TURNS)
        conversations = [buffer.conversation(name) for name in names]
        pool = await asyncpg.create_pool(bench.settings.postgres_url, min_size=2, max_size=2)
        buffer.runtime.database.on_query = lambda: queries.append(1)

        def ours(number: int) -> Awaitable[Any]:
            return conversations[number % READERS].context(TURNS)

        def bare(_: int) -> Awaitable[Any]:
            return redis.get("bare")

        def sql(query: str) -> Read:
            return lambda number: pool.fetch(query, names[number % READERS])

        async with pool:
            for measured in range(bench.rounds + 1):
                bench.say(f"read: round {measured} of {bench.rounds}")
                one, get_us, sql_us = await p50_us(ours, bare, sql(_LAST_20))
                same, slow_us = await p50_us(ours, sql(_LAST_20_SLOWLY), count=200)
                round_ = {
                    "one": (one, get_us),
                    "many": (await throughput(ours, 40, READERS), await throughput(bare, 40, READERS)),
                    "sql": (one, sql_us),
                    "slow": (same, slow_us),
                }
                for name, pair in round_.items() if measured else ():
                    pairs[name].append(pair)
        asked = len(queries)
    get = f"a bare redis-py GET of {TURNS * len(PAYLOAD):,} bytes"
    last = f"the last {TURNS} items by asyncpg"
    return [
        compare("warm context, p50", "us", pairs["one"], get, target=2, goal=None, better="lower"),
        compare(
            f"warm context, {READERS} readers",
            "reads/s",
            pairs["many"],
            get,
            target=0.4,
            goal=None,
            better="higher",
        ),
        compare("warm context, p50", "us", pairs["sql"], last, target=0.7, goal=None, better="lower"),
        compare(
            "warm context, p50",
            "us",
            pairs["slow"],
            f"{last}, 5 ms added",
            target=0.1,
            goal=None,
            better="lower",
        ),
        Result("queries of Postgres by warm reads", "", asked, None, "", asked, 0, None, "lower"),
    ]


async def views(bench: Bench) -> list[Result]:
    """What it costs appends and the flusher that every settled item enters a view."""
    one: list[tuple[float, float]] = []
    keeping_up: list[tuple[float, float]] = []
    without = bench.with_settings(view_max_bytes=0)
    async with (
        bench.buffer(flusher=True, name="views") as with_views,
        without.buffer(flusher=True, name="no_views") as no_views,
    ):
        ours, baseline = appender(with_views, "v"), appender(no_views, "n")
        for measured in range(2 * bench.rounds + 1):
            bench.say(f"views: round {measured} of {2 * bench.rounds}")
            with_, without_ = await p50_us(ours, baseline)
            if measured:
                one.append((with_, without_))
    for measured in range(bench.rounds + 1):
        bench.say(f"views, keeping up: round {measured} of {bench.rounds}")
        async with bench.buffer() as buffer:
            rate = await throughput(appender(buffer, "p"), 60)
            await fill(buffer, FLUSH_ROWS, lambda _: None)
        pair = (await drain(bench), rate)
        if measured:
            keeping_up.append(pair)
    return [
        compare("append p50", "us", one, "the same without views", target=1.1, goal=None, better="lower"),
        compare(
            "flush with views",
            "rows/s",
            keeping_up,
            "appends of 256 callers",
            target=1.2,
            goal=None,
            better="higher",
        ),
    ]


async def hits(bench: Bench) -> list[Result]:
    """Reads of 10,000 conversations, cold at the start, by popularity, with turns coming in all the time."""
    names = [f"z{n}" for n in range(HIT_CONVERSATIONS)]
    weights = list(itertools.accumulate(1 / rank**_ZIPF for rank in range(1, len(names) + 1)))
    chosen = iter(random.Random(1).choices(names, cum_weights=weights, k=HIT_READS))
    queries: list[int] = []
    async with bench.buffer(flusher=True) as buffer:
        await _load(buffer, names, bench)
        buffer.runtime.database.on_query = lambda: queries.append(1)

        async def reader() -> None:
            for number, name in enumerate(chosen):
                conversation = buffer.conversation(name)
                await conversation.context(TURNS)
                if number % 8 == 0:
                    await conversation.extend([ITEM, ITEM])

        began = time.perf_counter()
        bench.say(f"hits: {HIT_READS:,} reads")
        await asyncio.gather(*(reader() for _ in range(READERS)))
        bench.say(f"hits: {HIT_READS / (time.perf_counter() - began):,.0f} reads/s")
        asked = len(queries)
    return [
        Result(
            "hit rate, 10,000 conversations by Zipf",
            "",
            1 - asked / HIT_READS,
            None,
            "",
            1 - asked / HIT_READS,
            0.95,
            None,
            "higher",
        ),
        Result(
            "reads of Postgres",
            "",
            asked,
            HIT_READS,
            "one a read, as without views",
            asked / HIT_READS,
            0.1,
            None,
            "lower",
        ),
    ]


async def _load(buffer: Buffer, names: list[str], bench: Bench) -> None:
    """Put old conversations straight into Postgres."""
    bench.say(f"hits: {len(names):,} conversations")
    at = datetime.now(UTC)
    data = PAYLOAD.decode()
    async with buffer.runtime.database.transaction() as connection:
        await add_conversations(
            connection, [NewConversation("default", name, None, at, at) for name in names]
        )
        await copy_rows(
            connection,
            [
                Row("default", name, number, f"old-{number}", at, data)
                for name in names
                for number in range(1, HIT_HISTORY + 1)
            ],
        )
