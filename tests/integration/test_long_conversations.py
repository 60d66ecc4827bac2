"""A conversation of 100,000 items costs what one of 100 costs: its queries touch as few blocks."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine
from contextlib import asynccontextmanager
from datetime import UTC, datetime
from typing import Any

import asyncpg
import pytest
from asyncpg.connection import LoggedQuery
from redis.asyncio import Redis

from buffer import Buffer, Conversation
from buffer.store.pool import Database
from tests.integration.test_views import evict

LONG, SHORT, REMOVED = 100_000, 100, 20_000
# Beyond what the short one needs: another level of an index, and the block at a page's edge.
MORE_BLOCKS = 30

_COLUMNS = ("tenant", "conversation", "position", "item_id", "created_at", "data")


async def load(postgres: asyncpg.Connection, name: str, count: int) -> None:
    """An imported conversation of so many items, at positions 10, 20, ..."""
    at = datetime.now(UTC)
    rows = (("default", name, n * 10, f"m-{n}", at, json.dumps({"n": n})) for n in range(1, count + 1))
    await postgres.copy_records_to_table("items", schema_name="buffer", columns=_COLUMNS, records=rows)
    await postgres.execute(
        "insert into buffer.conversations (tenant, conversation, created_at) values ('default', $1, $2)",
        name,
        at,
    )


@pytest.fixture
def queries(monkeypatch: pytest.MonkeyPatch) -> list[LoggedQuery]:
    """Every query of every part of this process, the flusher included."""
    seen: list[LoggedQuery] = []

    def logged(original: Callable) -> Callable:
        @asynccontextmanager
        async def wrapped(self: Database) -> AsyncIterator[asyncpg.Connection]:
            async with original(self) as connection:
                with connection.query_logger(seen.append):
                    yield connection

        return wrapped

    monkeypatch.setattr(Database, "connection", logged(Database.connection))
    return seen


class Costs:
    """Blocks of Postgres that the queries about a conversation touch."""

    def __init__(self, buffer: Buffer, postgres: asyncpg.Connection, queries: list[LoggedQuery]) -> None:
        self._buffer = buffer
        self._postgres = postgres
        self._queries = queries

    async def of(self, name: str, act: Callable[[Conversation], Awaitable[object]]) -> tuple[int, int]:
        """How many queries it takes, and how many blocks they touch."""
        self._queries.clear()
        await act(self._buffer.conversation(name))
        about = [q for q in self._queries if any(_names(arg, name) for arg in q.args)]
        return len(about), sum([await self._blocks(query) for query in about])

    async def _blocks(self, logged: LoggedQuery) -> int:
        transaction = self._postgres.transaction()
        await transaction.start()
        try:
            text = await self._postgres.fetchval(
                f"explain (analyze, buffers, format json) {logged.query}", *logged.args
            )
        except asyncpg.UniqueViolationError:
            return 0
        finally:
            await transaction.rollback()
        plan = json.loads(text)[0]["Plan"]
        return plan["Shared Hit Blocks"] + plan["Shared Read Blocks"]


def _names(argument: object, name: str) -> bool:
    return argument == name or (isinstance(argument, list | tuple) and name in argument)


async def _flushing(buffer: Buffer, call: Coroutine[Any, Any, object]) -> None:
    """A call that waits for Postgres."""
    task = asyncio.create_task(call)
    while not task.done():
        await buffer.flush()
        await asyncio.wait([task], timeout=0.01)
    await task


async def test_whatever_is_done_costs_the_same_in_a_conversation_of_100_000_items(
    patient: Buffer, postgres: asyncpg.Connection, redis: Redis, queries: list[LoggedQuery]
) -> None:
    """Contexts, pages from both ends and from the middle, appends, pops and deletions."""
    count_of = {"long": LONG, "short": SHORT}
    for name, count in count_of.items():
        await load(postgres, name, count)
    await postgres.execute("analyze")
    costs = Costs(patient, postgres, queries)

    def middle(conversation: Conversation) -> int:
        return count_of[conversation.id] // 2

    acts: dict[str, Callable[[Conversation], Awaitable[object]]] = {
        "cold context": lambda c: c.context(),
        "warm context": lambda c: c.context(),
        "newest page": lambda c: c.items(order="desc", limit=20),
        "oldest page": lambda c: c.items(limit=20),
        "page after a position": lambda c: c.items(after=middle(c) * 10, limit=20),
        "page before a position": lambda c: c.items(before=middle(c) * 10, limit=20),
        "page after an id": lambda c: c.items(after=f"m-{middle(c)}", limit=20),
        "page after an id, descending": lambda c: c.items(after=f"m-{middle(c)}", limit=20, order="desc"),
        "append": lambda c: _flushing(patient, c.append({}, durability="stored")),
        "replace": lambda c: _flushing(
            patient, c.append({}, replace_after=f"m-{count_of[c.id] - 1}", durability="stored")
        ),
        "delete": lambda c: _flushing(patient, c.delete_item(f"m-{middle(c)}")),
        "pop": lambda c: _flushing(patient, c.pop()),
        "cold context after all that": lambda c: c.context(),
    }
    for what, act in acts.items():
        few, blocks = await costs.of("short", act)
        many, more_blocks = await costs.of("long", act)
        assert many == few, what
        assert more_blocks <= blocks + MORE_BLOCKS, what
        if what.startswith("cold"):
            assert few == 1, what
        if what.startswith("warm"):
            assert few == 0, what
    assert (await patient.conversation("long").items(limit=1)).items[0]["n"] == 1
    assert (await patient.conversation("long").items(after="m-99990", limit=1)).items[0]["n"] == 99_991


async def test_reads_do_not_walk_over_20_000_removed_items(
    patient: Buffer, postgres: asyncpg.Connection, redis: Redis, queries: list[LoggedQuery]
) -> None:
    """Until a vacuum they cost their share of the index, then nothing."""
    for name, count in (("gone", REMOVED), ("short", SHORT)):
        await load(postgres, name, count)
    await postgres.execute("analyze")
    for name in ("gone", "short"):
        await _flushing(patient, patient.conversation(name).append({}, id="last", replace_after="m-5"))
    await patient.flush()
    costs = Costs(patient, postgres, queries)
    acts: list[Callable[[Conversation], Awaitable[object]]] = [
        lambda c: c.context(),
        lambda c: c.items(order="desc", limit=20),
        lambda c: c.items(limit=20),
        lambda c: c.items(after="m-5", limit=20),
    ]
    for act in acts:
        await evict(redis, patient)
        await costs.of("gone", act)  # it leaves hints in the index
    for most in (REMOVED // 60, MORE_BLOCKS):
        for act in acts:
            await evict(redis, patient)
            _, blocks = await costs.of("short", act)
            _, more_blocks = await costs.of("gone", act)
            assert more_blocks <= blocks + most
        await postgres.execute("vacuum buffer.items")
    ids = [item.id for item in (await patient.conversation("gone").context()).items]
    assert ids == ["m-1", "m-2", "m-3", "m-4", "m-5", "last"]
