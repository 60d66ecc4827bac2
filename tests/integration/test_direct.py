"""Direct mode: no flusher has ever been there, so Postgres alone takes appends and answers reads."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import asyncpg
import pytest

from buffer import (
    Buffer,
    BufferError,
    Conflict,
    InvalidRequest,
    NotFound,
    PreconditionFailed,
    Settings,
    Unavailable,
)
from buffer.model.position import epoch_of, sequence_of
from buffer.model.types import Level
from tests.support.ledger import in_postgres, in_reads
from tests.support.load import under_load
from tests.support.paths import modes, on_path
from tests.support.polling import eventually


@pytest.fixture
async def direct(settings: Settings) -> AsyncIterator[Buffer]:
    """A buffer on a fresh database, without a flusher anywhere."""
    async with Buffer.connect(settings) as buffer:
        assert modes(buffer) == {"direct"}
        yield buffer


async def _rows(postgres: asyncpg.Connection) -> list[tuple[str, int]]:
    rows = await postgres.fetch("select item_id, position from buffer.items order by conversation, position")
    return [(r["item_id"], r["position"]) for r in rows]


async def _nothing_is_waiting(buffer: Buffer) -> None:
    """Every operation was let go of, and so was its share of the queue's limits."""
    coalescer = buffer.runtime.coalescer
    await eventually(lambda: (coalescer.operations, coalescer.bytes) == (0, 0), seconds=3)


# --- receipts


@pytest.mark.parametrize("level", ["buffered", "replicated", "stored"])
async def test_receipt_says_stored_and_direct_whatever_was_asked_for(
    direct: Buffer, postgres: asyncpg.Connection, level: Level
) -> None:
    """It is in Postgres already: more than was asked for, and said so."""
    conversation = direct.conversation("c")
    receipts = await conversation.extend([{"n": 1}, {"n": 2}], durability=level)
    assert [(r.level, r.path, r.duplicate) for r in receipts] == [("stored", "direct", False)] * 2
    assert await _rows(postgres) == [(r.id, r.position) for r in receipts]
    assert [(epoch_of(r.position), sequence_of(r.position)) for r in receipts] == [(1, 0), (1, 1)]
    await conversation.flushed(receipts[1], timeout=0.5)
    await direct.flush()
    await _nothing_is_waiting(direct)


async def test_direct_needs_no_redis(settings: Settings) -> None:
    """Nothing waits for a server that is not there: appends, reads, and waiting for a flush."""
    nowhere = settings.model_copy(update={"redis_url": "redis://127.0.0.1:1"})
    async with Buffer.connect(nowhere) as buffer:
        conversation = buffer.conversation("c")
        async with asyncio.timeout(2):
            receipt = await conversation.append({"n": 1}, durability="stored")
            assert [item.id for item in (await conversation.items()).items] == [receipt.id]
            await conversation.flushed(receipt)
            await buffer.flush()


# --- ids


async def test_repeat_gets_the_first_receipt_again(direct: Buffer, settings: Settings) -> None:
    """With an equal body, also from another process, written differently; stored once."""
    conversation = direct.conversation("c")
    first = await conversation.append({"a": 1, "b": [2.0]}, id="m-1")
    await conversation.append({"n": 2})
    async with Buffer.connect(settings) as other:
        for buffer in (direct, other):
            again = await buffer.conversation("c").append({"b": [2.0], "a": 1}, id="m-1")
            assert (again.position, again.duplicate, again.path) == (first.position, True, "direct")
    assert len((await conversation.items()).items) == 2


async def test_repeat_with_another_body_is_a_conflict(direct: Buffer) -> None:
    """It names the ids, and the first body stays."""
    conversation = direct.conversation("c")
    await conversation.append({"n": 1}, id="m-1")
    with pytest.raises(Conflict) as caught:
        await conversation.append({"n": 2}, id="m-1")
    assert caught.value.ids == ["m-1"]
    assert [dict(item) for item in (await conversation.items()).items] == [{"n": 1}]
    await direct.conversation("another").append({"n": 2}, id="m-1")


async def test_batch_is_repeated_whole_or_not_at_all(direct: Buffer, postgres: asyncpg.Connection) -> None:
    """Known whole: the first receipts. Known in part: a conflict, and nothing of it is stored."""
    conversation = direct.conversation("c")
    items, ids = [{"n": n} for n in range(3)], ["a", "b", "c"]
    first = await conversation.extend(items, ids=ids)
    again = await conversation.extend(items, ids=ids)
    assert [r.position for r in again] == [r.position for r in first]
    assert all(r.duplicate for r in again)
    with pytest.raises(Conflict):
        await conversation.extend([{"n": 2}, {"n": 3}], ids=["c", "d"])
    with pytest.raises(Conflict) as caught:
        await conversation.extend([{"n": 3}, {"n": 4}, {"n": 5}], ids=["d", "a", "c"])
    assert caught.value.ids == ["a", "c"]
    assert [item_id for item_id, _ in await _rows(postgres)] == ids


async def test_same_id_at_the_same_moment_is_stored_once(direct: Buffer, settings: Settings) -> None:
    """In one transaction and in several, through two processes: one position, one first receipt."""
    async with Buffer.connect(settings) as other:
        receipts = await asyncio.gather(
            *(b.conversation("c").append({"n": 1}, id="m-1") for b in [direct, other] * 10)
        )
    assert len({r.position for r in receipts}) == 1
    assert [r.duplicate for r in receipts].count(False) == 1
    await _nothing_is_waiting(direct)


# --- preconditions


async def test_if_match_compares_with_the_last_position(direct: Buffer, postgres: asyncpg.Connection) -> None:
    """0 for "no items yet"; a stale one is told the last position; a repeat is known before it is judged."""
    conversation = direct.conversation("c")
    first = await conversation.append({"n": 1}, id="m-1", if_match=0)
    with pytest.raises(PreconditionFailed) as caught:
        await conversation.append({"n": 2}, if_match=0)
    assert caught.value.last_position == first.position
    second = await conversation.append({"n": 2}, id="m-2", if_match=first.position)
    with pytest.raises(PreconditionFailed) as caught:
        await conversation.append({"n": 3}, if_match=first.position)
    assert caught.value.last_position == second.position
    assert (await conversation.append({"n": 2}, id="m-2", if_match=first.position)).duplicate
    assert [item_id for item_id, _ in await _rows(postgres)] == ["m-1", "m-2"]


async def test_of_many_with_the_same_if_match_one_succeeds(direct: Buffer, settings: Settings) -> None:
    """However they are batched, and whichever process they come through."""
    receipt = await direct.conversation("c").append({"n": 0})
    async with Buffer.connect(settings) as other:
        results = await asyncio.gather(
            *(b.conversation("c").append({"n": 1}, if_match=receipt.position) for b in [direct, other] * 10),
            return_exceptions=True,
        )
    failed = [r for r in results if isinstance(r, PreconditionFailed)]
    (won,) = [r for r in results if not isinstance(r, BaseException)]
    assert len(failed) == 19
    assert {error.last_position for error in failed} == {won.position}


async def test_while_a_process_is_missing_reads_are_incomplete_and_if_match_is_not_judged(
    direct: Buffer, postgres: asyncpg.Connection
) -> None:
    """The last position may be with it; appends without a condition go on."""
    conversation = direct.conversation("c")
    first = await conversation.append({"n": 1})
    shard = conversation._target.shard
    await postgres.execute("insert into buffer.missing (shard, process) values ($1, 'gone')", shard)
    await eventually(lambda: not direct.runtime.member.states[shard].clean)
    assert not (await conversation.items()).complete
    assert not (await conversation.context()).complete
    with pytest.raises(Unavailable, match="missing"):
        await conversation.append({"n": 2}, if_match=first.position)
    second = await conversation.append({"n": 2})
    await postgres.execute("delete from buffer.missing")
    assert (await conversation.items()).complete
    await eventually(lambda: direct.runtime.member.states[shard].clean)
    await conversation.append({"n": 3}, if_match=second.position)


async def test_replace_after_removes_what_follows(direct: Buffer) -> None:
    """In one step with the append; an item that is not there is an error, and nothing is stored."""
    conversation = direct.conversation("c")
    await conversation.extend([{"n": n} for n in range(4)], ids=list("abcd"))
    await conversation.append({"n": 9}, id="e", replace_after="b")
    assert [item.id for item in (await conversation.items()).items] == ["a", "b", "e"]
    with pytest.raises(NotFound):
        await conversation.append({"n": 10}, replace_after="d")
    with pytest.raises(Conflict):
        await conversation.append({"n": 3}, id="d")
    assert [item.id for item in (await conversation.items()).items] == ["a", "b", "e"]


# --- what is stored


async def test_conversations_and_users_are_recorded(direct: Buffer, postgres: asyncpg.Connection) -> None:
    """As a flush records them."""
    await direct.conversation("c", tenant="acme", user="u42").append({"n": 1})
    await direct.conversation("d", tenant="acme").append({"n": 1})
    await direct.conversation("d", tenant="acme", user="u43").append({"n": 2})
    rows = await postgres.fetch("select tenant, conversation, user_id from buffer.conversations")
    assert {tuple(r) for r in rows} == {("acme", "c", "u42"), ("acme", "d", "u43")}


async def test_row_that_postgres_refuses_is_rejected_and_its_neighbours_are_stored(
    direct: Buffer, postgres: asyncpg.Connection
) -> None:
    """Those that travel with it, too; it is certain that the bad one is not stored."""
    await postgres.execute("alter table buffer.items add constraint poison check (item_id <> 'poison')")
    conversation = direct.conversation("c")
    results = await asyncio.gather(
        *(conversation.append({"n": n}, id="poison" if n == 7 else f"m-{n}") for n in range(20)),
        return_exceptions=True,
    )
    (error,) = [r for r in results if isinstance(r, BaseException)]
    assert isinstance(error, InvalidRequest)
    assert results.index(error) == 7
    positions = [r.position for r in results if not isinstance(r, BaseException)]
    assert positions == sorted(positions)
    assert [position for _, position in await _rows(postgres)] == positions
    await _nothing_is_waiting(direct)


async def test_what_fails_in_postgres_is_tried_again_until_its_time_is_up(
    direct: Buffer, postgres: asyncpg.Connection
) -> None:
    """A missing table is nobody's fault who appends: it waits, expires as unknown, and is let go of."""
    await postgres.execute("alter table buffer.items rename to elsewhere")
    conversation = direct.conversation("c")
    late = asyncio.create_task(conversation.append({"n": 1}, id="m-1"))
    with pytest.raises(BufferError, match=r"within 0\.2 s"):
        await conversation.append({"n": 2}, timeout=0.2)
    with pytest.raises(TimeoutError):  # its caller gives up
        async with asyncio.timeout(0.1):
            await conversation.append({"n": 3})
    await postgres.execute("alter table buffer.elsewhere rename to items")
    receipt = await late
    # Those who gave up may be there as well: one was on its way when the table came back.
    assert ("m-1", receipt.position) in await _rows(postgres)
    await _nothing_is_waiting(direct)


# --- many at once


async def test_many_appends_from_two_processes_keep_order_and_are_numbered_without_gaps(
    direct: Buffer, settings: Settings, postgres: asyncpg.Connection
) -> None:
    """Acks ascend for each writer, and what is read is what was acked, in that order, once."""
    async with (
        Buffer.connect(settings) as other,
        under_load(direct, writers=8, tenant="one") as one,
        under_load(other, writers=8, tenant="two") as two,
    ):
        await eventually(lambda: min(one.acked, two.acked) >= 300)
    for load in (one, two):
        assert not load.ledger.faults(await in_postgres(postgres, load.ledger.tenant))
        assert not load.ledger.faults(await in_reads(direct, load.ledger.conversations, load.ledger.tenant))
    for row in await postgres.fetch("select shard, next_direct, direct_turns from buffer.shards"):
        numbers = await _numbers(postgres, direct, row["shard"])
        assert numbers == list(range(row["next_direct"]))
        assert row["direct_turns"] == row["next_direct"]
    await _nothing_is_waiting(direct)


async def _numbers(postgres: asyncpg.Connection, buffer: Buffer, shard: int) -> list[int]:
    rows = await postgres.fetch("select tenant, conversation, position from buffer.items order by position")
    return [
        sequence_of(r["position"])
        for r in rows
        if buffer.conversation(r["conversation"], tenant=r["tenant"])._target.shard == shard
    ]


async def test_what_one_process_appends_every_other_reads_at_once(direct: Buffer, settings: Settings) -> None:
    """Pages and contexts come from Postgres, and are complete."""
    async with Buffer.connect(settings) as other:
        for number in range(5):
            await direct.conversation("c").append({"n": number}, id=f"m-{number}")
            page = await other.conversation("c").items()
            assert ([item["n"] for item in page.items], page.complete) == (list(range(number + 1)), True)
        context = await other.conversation("c").context(turns=2)
        assert [item.id for item in context.items] == ["m-3", "m-4"]
        page = await other.conversation("c").items(after="m-1", limit=2)
        assert ([item.id for item in page.items], page.has_more) == (["m-2", "m-3"], True)


# --- the path moves


async def test_append_of_an_older_epoch_is_not_taken(direct: Buffer, postgres: asyncpg.Connection) -> None:
    """The row has moved on and this process does not know yet: its append waits until it does."""
    conversation = direct.conversation("c")
    await conversation.append({"n": 1})
    await postgres.execute("update buffer.shards set path_epoch = 5, next_direct = 0")
    receipt = await conversation.append({"n": 2})
    assert (epoch_of(receipt.position), sequence_of(receipt.position)) == (5, 0)
    assert [item["n"] for item in (await conversation.items()).items] == [1, 2]


async def test_read_by_an_older_view_of_the_path_is_not_answered(
    settings: Settings, postgres: asyncpg.Connection
) -> None:
    """What Postgres has is not all any more, and this process does not know yet: it says so, or waits."""
    hasty = settings.model_copy(update={"append_timeout_seconds": 0.2})
    async with Buffer.connect(hasty) as buffer:
        conversation = buffer.conversation("c")
        await conversation.append({"n": 1})
        await postgres.execute("update buffer.shards set path_epoch = 2, mode = 'stream', run_id = 'none'")
        assert modes(buffer) == {"direct"}
        with pytest.raises(Unavailable):
            await conversation.items()


async def test_while_the_path_is_closing_nothing_is_taken(
    direct: Buffer, postgres: asyncpg.Connection
) -> None:
    """Appends wait and expire as certainly not stored; reads wait, too; then both go on."""
    conversation = direct.conversation("c")
    await conversation.append({"n": 1})
    await postgres.execute("update buffer.shards set path_epoch = 2, mode = 'closing'")
    await on_path(direct, "closing")
    with pytest.raises(Unavailable, match="not taken"):
        await conversation.append({"n": 2}, timeout=0.1)
    waiting = asyncio.create_task(conversation.append({"n": 3}))
    reading = asyncio.create_task(conversation.items())
    await postgres.execute("update buffer.shards set mode = 'direct', next_direct = 0")
    assert epoch_of((await waiting).position) == 2
    assert [item["n"] for item in (await reading).items] in ([1], [1, 3])


async def test_what_was_appended_directly_is_known_after_the_return_to_the_stream(
    direct: Buffer, settings: Settings, postgres: asyncpg.Connection
) -> None:
    """Redis cannot know its id: Postgres is asked, and the repeat gets its first position."""
    conversation = direct.conversation("c")
    first = await conversation.extend([{"n": 1}, {"n": 2}], ids=["a", "b"])
    async with Buffer.connect(settings, flusher=True) as flushing:
        await on_path(direct, "stream")
        again = await conversation.extend([{"n": 1}, {"n": 2}], ids=["a", "b"])
        assert [(r.position, r.duplicate) for r in again] == [(r.position, True) for r in first]
        with pytest.raises(Conflict) as caught:
            await flushing.conversation("c").append({"n": 3}, id="b")
        assert caught.value.ids == ["b"]
        with pytest.raises(Conflict):
            await conversation.extend([{"n": 2}, {"n": 3}], ids=["b", "c"])
        third = await conversation.append({"n": 3}, id="c", if_match=first[1].position)
        assert (third.path, third.position > first[1].position) == ("stream", True)
        assert [item.id for item in (await conversation.items()).items] == ["a", "b", "c"]
        await conversation.flushed(third)
    assert [item_id for item_id, _ in await _rows(postgres)] == ["a", "b", "c"]
    assert await postgres.fetchval("select count(*) from buffer.dead_letters") == 0
    await _nothing_is_waiting(direct)


async def test_writers_go_on_through_the_return_to_the_stream(
    direct: Buffer, settings: Settings, postgres: asyncpg.Connection
) -> None:
    """Nothing is lost, doubled or out of order, and nobody is told to go away."""
    async with under_load(direct, writers=8) as load:
        await eventually(lambda: load.acked > 100)
        async with Buffer.connect(settings, flusher=True):
            await on_path(direct, "stream")
            goal = load.acked + 200
            await eventually(lambda: load.acked > goal)
            load.stopping.set()
            await direct.flush()
    assert (load.refused, load.unknown) == (0, 0)
    assert not load.ledger.faults(await in_postgres(postgres))
    await _nothing_is_waiting(direct)
