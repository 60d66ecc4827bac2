"""Cached views in races that are made to happen: each step of a settlement is let through by hand."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from typing import Any

import asyncpg
import pytest
from redis.asyncio import Redis

from buffer import Buffer, Settings, Unavailable
from buffer.app.runtime import open_database
from buffer.flush import batch
from buffer.stream.shards import Backlog, Settlement, Tail, ViewLimits
from buffer.transfer import import_file
from tests.integration.test_views import evict, queries, shown, views
from tests.support.paths import on_path
from tests.support.polling import eventually


class Gate:
    """What the flusher has committed is settled one step at a time."""

    def __init__(self, buffer: Buffer) -> None:
        self._shards = buffer.runtime.shards
        self._settle = self._shards.settle
        self._peek = self._shards.peek
        self._permits = asyncio.Semaphore(0)
        self._may_look = asyncio.Event()
        self._may_look.set()
        self.passed = 0

    async def peek(self, shards: Sequence[int]) -> list[Backlog]:
        """In place of `Shards.peek`."""
        await self._may_look.wait()
        return await self._peek(shards)

    @asynccontextmanager
    async def unseen(self) -> AsyncIterator[None]:
        """What is appended meanwhile is seen by the flusher all at once."""
        self._may_look.clear()
        yield
        self._may_look.set()

    async def settle(self, shard: int, epoch: int, steps: Sequence[Settlement], views: ViewLimits) -> int:
        """In place of `Shards.settle`."""
        mark = -1
        for step in steps:
            await self._permits.acquire()
            mark = await self._settle(shard, epoch, [step], views)
            self.passed += 1
        return mark

    async def step(self) -> None:
        """Let one step through, and return once it is done."""
        before = self.passed
        self._permits.release()
        await eventually(lambda: self.passed > before)

    def open(self) -> None:
        """Let all through from now on."""
        for _ in range(10_000):
            self._permits.release()


@asynccontextmanager
async def gated(buffer: Buffer, monkeypatch: pytest.MonkeyPatch, entries: int = 2) -> AsyncIterator[Gate]:
    """Steps of so many entries, held until they are let through."""
    gate = Gate(buffer)
    monkeypatch.setattr(batch, "SETTLE_STEP", entries)
    monkeypatch.setattr(buffer.runtime.shards, "settle", gate.settle)
    monkeypatch.setattr(buffer.runtime.shards, "peek", gate.peek)
    try:
        yield gate
    finally:
        gate.open()


def _slow(settings: Settings, turns: int) -> AbstractAsyncContextManager[Buffer]:
    """A buffer whose flusher flushes in batches of so many items, when it is asked to."""
    changes = {"flush_interval_seconds": 60.0, "flush_max_turns": turns}
    return Buffer.connect(settings.model_copy(update=changes), flusher=True)


async def committed(buffer: Buffer, postgres: asyncpg.Connection, position: int) -> None:
    """Have everything up to a position of conversation c committed, settled or not."""
    shard = buffer.conversation("c")._target.shard
    await buffer.runtime.shards.nudge(shard)

    async def is_committed() -> bool:
        query = "select flushed_through from buffer.shards where shard = $1"
        return await postgres.fetchval(query, shard) >= position

    await eventually(is_committed)


@pytest.mark.parametrize("flushes", [1, 2])
async def test_a_view_filled_ahead_of_the_mark_shows_no_gap_until_redis_catches_up(
    settings: Settings,
    postgres: asyncpg.Connection,
    redis: Redis,
    monkeypatch: pytest.MonkeyPatch,
    flushes: int,
) -> None:
    """Filled between commit and settle, of the same flush or the one before: nothing is missing or double."""
    names = [f"m-{n}" for n in range(10)]
    async with _slow(settings, 100 if flushes == 1 else 4) as buffer, gated(buffer, monkeypatch) as gate:
        conversation = buffer.conversation("c")
        async with gate.unseen():
            for at in range(0, 10, 5):
                bodies = [{"role": "user" if at else "system", "content": "x"}] * 5
                receipts = await conversation.extend(bodies, ids=names[at : at + 5])
        await committed(buffer, postgres, receipts[-1].position)
        with queries(buffer) as asked:
            for step in range(7):
                for turns in (1, 2, 3, 5, 9, 10, 20):
                    assert await shown(buffer, turns) == names[-turns:]
                pinned = await conversation.context(3, pin_system=True)
                assert [item.id for item in pinned.items] == ["m-0", "m-8", "m-9"]
                if step < 5:
                    await gate.step()
            assert asked == [1]


async def test_what_a_later_flush_removed_is_not_brought_back_by_an_earlier_one(
    settings: Settings, postgres: asyncpg.Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A view filled after the removal, while items from before it are settled: they stay out of it."""
    async with _slow(settings, 4) as buffer, gated(buffer, monkeypatch) as gate:
        conversation = buffer.conversation("c")
        async with gate.unseen():
            await conversation.extend([{}] * 4, ids=["m-0", "m-1", "m-2", "m-3"])
            receipt = await conversation.append({}, id="m-4", replace_after="m-1")
        await committed(buffer, postgres, receipt.position)
        for step in range(4):
            for turns in (1, 2, 3, 20):
                assert await shown(buffer, turns) == ["m-0", "m-1", "m-4"][-turns:]
            if step < 3:
                await gate.step()


async def test_a_view_begun_after_an_import_is_dropped_again(
    patient: Buffer, settings: Settings, postgres: asyncpg.Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Committed as new, then older items are imported, and only then Redis begins its view: not for long."""
    async with gated(patient, monkeypatch) as gate:
        receipt = await patient.conversation("c").append({}, id="m-9")
        await committed(patient, postgres, receipt.position)
        line = json.dumps({"conversation_id": "c", "items": [{"id": "m-0"}]})
        async with open_database(settings) as database:
            assert (await import_file(database, [line], settings=settings)).ok
        with contextlib.suppress(AssertionError):  # whoever drops views must not be done before
            await eventually(lambda: _none_left(postgres), seconds=1.0)
        await gate.step()

    async def seen() -> bool:
        return await shown(patient) == ["m-0", "m-9"]

    await eventually(seen)


async def _none_left(postgres: asyncpg.Connection) -> bool:
    return await postgres.fetchval("select count(*) from buffer.stale_views") == 0


async def test_a_conversation_with_a_dead_letter_does_not_begin_warm(
    patient: Buffer, redis: Redis, postgres: asyncpg.Connection
) -> None:
    """Nothing of it was ever stored but the letter: its first item makes no view that says "complete"."""
    await postgres.execute(
        "insert into buffer.dead_letters (tenant, conversation, item_id, position, payload, reason)"
        " values ('default', 'c', 'lost', 1, '{}', 'written off')"
    )
    await patient.conversation("c").append({}, id="m-0")
    await patient.flush()
    assert await views(redis, patient) == []
    assert not (await patient.conversation("c").context()).complete


async def test_a_flusher_without_views_drops_those_of_others(settings: Settings, redis: Redis) -> None:
    """Processes with other settings beside it still fill views: they must not stay as they are."""
    without = settings.model_copy(update={"view_max_bytes": 0})
    async with Buffer.connect(without, flusher=True) as flusher, Buffer.connect(settings) as buffer:
        await on_path(buffer, "stream")
        for number in range(5):
            await buffer.conversation("c").append({}, id=f"m-{number}")
            for _ in range(2):
                assert await shown(buffer) == [f"m-{n}" for n in range(number + 1)]
                await flusher.flush()


async def test_a_read_that_fails_or_is_cancelled_gives_its_claim_back(
    patient: Buffer, redis: Redis, postgres: asyncpg.Connection
) -> None:
    """The next one fills the view at once, and waits for nobody."""
    conversation = patient.conversation("c")
    await conversation.append({}, id="m-0")
    await patient.flush()
    await evict(redis, patient)
    fills = patient.runtime.shards.keys[conversation._target.shard].fills

    def away() -> None:
        raise Unavailable("Postgres is away")

    patient.runtime.database.on_query = away
    with pytest.raises(Unavailable, match="away"):
        await conversation.context()
    patient.runtime.database.on_query = None
    await eventually(lambda: _has_no(redis, fills))

    async with postgres.transaction():
        await postgres.execute("lock table buffer.items in access exclusive mode")
        read = asyncio.create_task(conversation.context())
        await eventually(lambda: redis.exists(fills))
        others = [asyncio.create_task(shown(patient)) for _ in range(3)]
        read.cancel()
        await asyncio.wait([read])
    assert await asyncio.gather(*others) == [["m-0"]] * 3
    assert await views(redis, patient)


async def _has_no(redis: Redis, key: bytes) -> bool:
    return not await redis.exists(key)


async def test_a_view_that_began_empty_learns_the_first_item(patient: Buffer, redis: Redis) -> None:
    """Read before its first append, as chats do: a pinned system message is at hand all the same."""
    conversation = patient.conversation("c")
    with queries(patient) as asked:
        assert await shown(patient) == []
        await conversation.append({"role": "system", "content": "be brief"}, id="first")
        await patient.flush()
        await conversation.extend([{"role": "user", "content": "x"}] * 9, ids=[f"m-{n}" for n in range(9)])
        await patient.flush()
        context = await conversation.context(2, pin_system=True)
        assert [item.id for item in context.items] == ["first", "m-8"]
        assert await shown(patient) == ["first", *(f"m-{n}" for n in range(9))]
    assert asked == [1]
    (key,) = await views(redis, patient)
    assert 0 < await redis.ttl(key) <= 900


async def test_a_flush_between_two_parts_of_a_long_tail_leaves_no_gap(
    patient: Buffer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The view was read with the first part; what is flushed then is neither in it nor in the next part."""
    tail = patient.runtime.shards.tail
    flushed = []

    async def after_a_flush(*args: Any) -> Tail:
        await patient.flush()
        flushed.append(args)
        return await tail(*args)

    monkeypatch.setattr(patient.runtime.shards, "tail", after_a_flush)
    for turns in (99, 101, 102, 150, 200, 204, 300):
        conversation = patient.conversation(f"c-{turns}")
        names = [f"m-{n}" for n in range(203)]
        await conversation.extend([{}] * 3, ids=names[:3])
        await patient.flush()
        await conversation.extend([{}] * 200, ids=names[3:])
        assert await shown(patient, turns, f"c-{turns}") == names[-turns:]
        assert await shown(patient, turns, f"c-{turns}") == names[-turns:]
    assert len(flushed) >= 5


async def test_a_late_repeat_of_an_item_in_the_view_is_not_shown_twice(patient: Buffer, redis: Redis) -> None:
    """The idempotency window has forgotten its id; its first place counts, and what it removed then."""
    conversation = patient.conversation("c")
    await conversation.extend([{"n": n} for n in range(5)], ids=[f"m-{n}" for n in range(5)])
    await patient.flush()
    keys = patient.runtime.shards.keys[conversation._target.shard]
    await redis.delete(keys.ids, keys.ids_old)
    receipt = await conversation.append({"n": 3}, id="m-3")
    assert not receipt.duplicate
    for _ in range(2):
        assert await shown(patient) == [f"m-{n}" for n in range(5)]
        await patient.flush()
