"""Cached views: one round trip where there is one, one query where there is none, never a stale answer."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from contextlib import contextmanager

import asyncpg
import pytest
from redis.asyncio import Redis

from buffer import Buffer, Settings, Unavailable
from buffer.app.runtime import open_database
from buffer.model.position import sequence_of
from buffer.stream.shards import Refused
from buffer.stream.views import encode
from buffer.transfer import import_file
from tests.support.paths import on_path
from tests.support.polling import eventually


@contextmanager
def queries(buffer: Buffer) -> Iterator[list[int]]:
    """One entry for each query of Postgres by this process; the flusher has connections of its own."""
    seen: list[int] = []
    buffer.runtime.database.on_query = lambda: seen.append(1)
    yield seen
    buffer.runtime.database.on_query = None


async def views(redis: Redis, buffer: Buffer, conversation: str = "*") -> list[bytes]:
    """The keys of the test's views."""
    return await redis.keys(f"{buffer.settings.key_prefix}:*:view:*:default/{conversation}")


async def evict(redis: Redis, buffer: Buffer) -> None:
    """What memory pressure, or the end of a TTL, does."""
    if keys := await views(redis, buffer):
        await redis.delete(*keys)


async def shown(buffer: Buffer, turns: int = 20, conversation: str = "c") -> list[str]:
    context = await buffer.conversation(conversation).context(turns)
    assert context.complete
    return [item.id for item in context.items]


async def test_a_new_conversation_is_warm_from_its_first_item_across_flushes(patient: Buffer) -> None:
    """Every read after every append, flushed or not, is right, and none asks Postgres."""
    conversation = patient.conversation("c")
    with queries(patient) as asked:
        for number in range(60):
            receipt = await conversation.append({"n": number}, id=f"m-{number}")
            if number % 7 == 0:
                await patient.flush()
            context = await conversation.context(20)
            expected = list(range(max(0, number - 19), number + 1))
            assert [item["n"] for item in context.items] == expected
            assert [item.id for item in context.items] == [f"m-{n}" for n in expected]
            assert context.last_position == context.items[-1].position == receipt.position
        assert await shown(patient, 100) == [f"m-{n}" for n in range(60)]
    assert asked == []


async def test_a_warm_read_gives_items_as_a_cold_one_does(patient: Buffer, redis: Redis) -> None:
    """Bodies, ids, positions, times and the last position are the same from the view and from Postgres."""
    conversation = patient.conversation('c "\\ 會話')
    bodies = [
        {"text": 'quote " and \\ and \u0000'},
        {"lone": "\ud800"},
        {"big": 10**40, "x": [1.5, None]},
        {},
    ]
    ids = ["plain", 'quo"te', "back\\slash", "號"]
    await conversation.extend(bodies, ids=ids)
    await patient.flush()
    warm = await conversation.context()
    await evict(redis, patient)
    with queries(patient) as asked:
        filled = await conversation.context()
        again = await conversation.context()
    assert asked == [1]
    for context in (filled, again):
        assert context == warm
        for one, other in zip(context.items, warm.items, strict=True):
            assert (one.id, one.position, one.created_at) == (other.id, other.position, other.created_at)
    assert list(warm.items) == bodies
    assert [item.id for item in warm.items] == ids


async def test_cold_reads_share_one_query_in_all_processes(
    patient: Buffer, settings: Settings, redis: Redis
) -> None:
    """A hundred readers in two processes: one of them asks Postgres, whoever comes later asks nobody."""
    await patient.conversation("c").extend([{}] * 30, ids=[f"m-{n}" for n in range(30)])
    await patient.flush()
    async with Buffer.connect(settings) as other:
        await on_path(other, "stream")
        await evict(redis, patient)
        with queries(patient) as ours, queries(other) as theirs:
            reads = [shown(buffer) for _ in range(50) for buffer in (patient, other)]
            answers = await asyncio.gather(*reads)
            assert len(ours) + len(theirs) == 1
            assert await shown(other) == await shown(patient) == answers[0]
            assert len(ours) + len(theirs) == 1
    assert answers == [[f"m-{n}" for n in range(10, 30)]] * 100


async def test_an_empty_conversation_is_cached_too_and_begins_with_its_first_item(
    patient: Buffer, redis: Redis
) -> None:
    """One query says that there is nothing; what is appended then is seen at once, and after its flush."""
    with queries(patient) as asked:
        assert await shown(patient) == await shown(patient) == []
        await patient.conversation("c").append({}, id="m-0")
        assert await shown(patient) == ["m-0"]
        await patient.flush()
        assert await shown(patient) == ["m-0"]
    assert asked == [1]


async def test_a_view_is_bounded_in_bytes_and_in_items(settings: Settings, redis: Redis) -> None:
    """However long the conversation, and however it came there; what is beyond it comes from Postgres."""
    small = settings.model_copy(update={"view_max_bytes": 4_000, "view_max_items": 10})
    async with Buffer.connect(small, flusher=True) as buffer:
        await on_path(buffer, "stream")
        names = []
        for number in range(90):
            size = 3_000 if number in {40, 41} else 9_000 if number == 60 else 20
            await buffer.conversation("c").append({"text": "x" * size}, id=f"m-{number}")
            names.append(f"m-{number}")
            if number % 3 == 0:
                await buffer.flush()
                (key,) = await views(redis, buffer)
                assert await redis.strlen(key) <= 4_500
            assert await shown(buffer, 5) == names[-5:]
            assert await shown(buffer, 100) == names
        await buffer.flush()
        with queries(buffer) as asked:
            assert await shown(buffer, 5) == names[-5:]
            assert asked == []
            assert await shown(buffer, 50) == names[-50:]
            assert asked == [1]
        await evict(redis, buffer)
        for _ in range(2):  # filled by a read of more than a view holds
            assert await shown(buffer, 100) == names
        await evict(redis, buffer)
        await shown(buffer, 5)
        (key,) = await views(redis, buffer)
        assert 200 < await redis.strlen(key) <= 4_500


async def test_a_pinned_system_message_needs_no_second_read(patient: Buffer, redis: Redis) -> None:
    """The first item is at hand in a view that has been cut back, and after a fill."""
    conversation = patient.conversation("c")
    await conversation.append({"role": "system", "content": "be brief"}, id="first")
    for number in range(300):
        await conversation.append({"role": "user", "content": str(number)}, id=f"m-{number}")
        if number % 50 == 0:
            await patient.flush()
    await patient.flush()
    with queries(patient) as asked:
        for expected in ([], [1]):
            context = await conversation.context(3, pin_system=True)
            assert [item.id for item in context.items] == ["first", "m-298", "m-299"]
            assert asked == expected
            await evict(redis, patient)


async def test_reading_keeps_a_view_alive(settings: Settings, redis: Redis) -> None:
    """The time to live slides with reads; without them the view ends, and is filled again when asked for."""
    brief = settings.model_copy(update={"cache_ttls": {"conversation": 1.0}})
    async with Buffer.connect(brief, flusher=True) as buffer:
        await on_path(buffer, "stream")
        await buffer.conversation("c").append({}, id="m-0")
        await buffer.conversation("idle").append({}, id="m-0")
        await buffer.flush()
        with queries(buffer) as asked:
            await eventually(lambda: _gone_while_reading(redis, buffer))
            assert asked == []
            assert await shown(buffer, conversation="idle") == ["m-0"]
            assert asked == [1]
        assert await views(redis, buffer, "c")


async def _gone_while_reading(redis: Redis, buffer: Buffer) -> bool:
    await shown(buffer)
    return not await views(redis, buffer, "idle")


@pytest.mark.parametrize("change", ["delete_item", "pop", "replace", "delete"])
async def test_a_view_never_shows_what_was_removed(patient: Buffer, redis: Redis, change: str) -> None:
    """Not while the removal waits for its flush, not after it, not from a fill."""
    conversation = patient.conversation("c")
    await conversation.extend([{}] * 5, ids=[f"m-{n}" for n in range(5)])
    await patient.flush()
    expected = [f"m-{n}" for n in range(5)]
    if change == "delete_item":
        await conversation.delete_item("m-2")
        expected.remove("m-2")
    elif change == "pop":
        await conversation.pop()
        expected.remove("m-4")
    elif change == "replace":
        await conversation.append({}, id="m-5", replace_after="m-1")
        expected = ["m-0", "m-1", "m-5"]
    else:
        await conversation.delete()
        expected = []
    for _ in range(3):
        assert await shown(patient) == expected
        await patient.flush()
        assert await shown(patient) == expected
        await evict(redis, patient)


async def test_a_fill_looks_further_back_where_the_tail_removes_what_it_found(
    settings: Settings, redis: Redis
) -> None:
    """A replacement that is not flushed removes more than all that a fill finds."""
    short = settings.model_copy(update={"view_max_items": 5, "flush_interval_seconds": 60.0})
    async with Buffer.connect(short, flusher=True) as buffer:
        conversation = buffer.conversation("c")
        await conversation.extend([{}] * 30, ids=[f"m-{n}" for n in range(30)])
        await buffer.flush()
        await conversation.append({}, id="last", replace_after="m-9")
        for turns in (1, 2, 3, 10, 11, 12):
            await evict(redis, buffer)
            for _ in range(2):
                assert await shown(buffer, turns) == [*(f"m-{n}" for n in range(10)), "last"][-turns:]


async def test_what_a_warm_read_shows_stays_with_its_process(patient: Buffer, settings: Settings) -> None:
    """What a client has seen does not go with the process that accepted it, even if Redis goes, too."""
    async with Buffer.connect(settings) as other:
        await on_path(other, "stream")
        await patient.conversation("c").append({}, id="m-0")
        await patient.flush()
        assert await shown(other) == ["m-0"]
        assert other.runtime.member.retention.turns == 0
        await patient.conversation("c").append({}, id="m-1")
        with queries(other) as asked:
            assert await shown(other) == ["m-0", "m-1"]
        assert asked == []
        assert other.runtime.member.retention.turns == 1


async def test_a_fill_that_missed_a_flush_is_not_put_in_place(patient: Buffer) -> None:
    """Settled after its snapshot: refused. Settled between claim and snapshot: accepted."""
    runtime = patient.runtime
    conversation = patient.conversation("c")
    await conversation.append({}, id="m-0")
    await patient.flush()
    target = conversation._target
    epoch = runtime.member.states[target.shard].epoch
    await runtime.views.drop(target.shard, epoch, [target.key_bytes])
    empty = encode([], whole=True, first=None, last=0, summary=None)

    for snapshot_first in (True, False):
        assert await runtime.views.claim(target.shard, epoch, target.key_bytes, b"token")
        assert not await runtime.views.claim(target.shard, epoch, target.key_bytes, b"other")
        receipt = await conversation.append({})
        await patient.flush()
        flushed = sequence_of(receipt.position) - (1 if snapshot_first else 0)
        filled = await runtime.views.fill(target.shard, epoch, target.key_bytes, b"token", flushed, empty)
        assert filled == (not snapshot_first)
        await runtime.views.drop(target.shard, epoch, [target.key_bytes])


async def test_a_fill_without_its_claim_or_of_another_epoch_is_refused(patient: Buffer) -> None:
    """Whoever dropped the view, or changed the path, has ended it."""
    runtime = patient.runtime
    target = patient.conversation("c")._target
    await on_path(patient, "stream")
    epoch = runtime.member.states[target.shard].epoch
    empty = encode([], whole=True, first=None, last=0, summary=None)
    assert await runtime.views.claim(target.shard, epoch, target.key_bytes, b"token")
    assert not await runtime.views.fill(target.shard, epoch, target.key_bytes, b"other", 99, empty)
    await runtime.views.drop(target.shard, epoch, [target.key_bytes])
    assert not await runtime.views.fill(target.shard, epoch, target.key_bytes, b"token", 99, empty)
    for call in (
        runtime.views.claim(target.shard, epoch + 1, target.key_bytes, b"token"),
        runtime.views.fill(target.shard, epoch + 1, target.key_bytes, b"token", 99, empty),
        runtime.views.read(target.shard, epoch + 1, target.key_bytes, 10, 10),
    ):
        with pytest.raises(Refused):
            await call


async def test_a_conversation_with_dead_letters_is_not_cached(
    patient: Buffer, redis: Redis, postgres: asyncpg.Connection
) -> None:
    """Its reads say so from the flush on, and no longer once somebody has acted."""
    conversation = patient.conversation("c")
    await conversation.append({}, id="m-0")
    await patient.flush()
    await postgres.execute(
        "alter table buffer.items add constraint no_poison check (item_id <> 'poison') not valid"
    )
    await conversation.append({}, id="poison")
    await patient.flush()
    for _ in range(2):
        context = await conversation.context()
        assert ([item.id for item in context.items], context.complete) == (["m-0"], False)
        assert await views(redis, patient) == []
    await postgres.execute("delete from buffer.dead_letters")
    assert await shown(patient) == ["m-0"]
    assert await views(redis, patient)


async def test_an_import_is_seen_through_views_that_were_there_before(
    patient: Buffer, settings: Settings
) -> None:
    """Older items arrive beside the stream: whole views, empty ones and short ones show them soon."""
    assert await shown(patient, conversation="empty") == []
    await patient.conversation("short").append({}, id="m-9")
    await patient.flush()
    assert await shown(patient, conversation="short") == ["m-9"]
    items = [{"id": f"m-{n}", "n": n} for n in range(3)]
    lines = [json.dumps({"conversation_id": name, "items": items}) for name in ("empty", "short")]
    async with open_database(settings) as database:
        report = await import_file(database, lines, settings=settings)
    assert (report.ok, report.stored) == (True, 6)

    async def seen() -> bool:
        empty, short = [await shown(patient, conversation=name) for name in ("empty", "short")]
        return (empty, short) == (["m-0", "m-1", "m-2"], ["m-0", "m-1", "m-2", "m-9"])

    await eventually(seen)


async def test_without_postgres_warm_reads_go_on_and_cold_ones_say_why(
    patient: Buffer, redis: Redis, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A cached conversation is served, tail included; one that is not cached is an error, never empty."""
    await patient.conversation("warm").append({}, id="m-0")
    await patient.conversation("cold").append({}, id="m-0")
    await patient.flush()
    await redis.delete(*await views(redis, patient, "cold"))

    def away() -> None:
        raise Unavailable("Postgres is away")

    patient.runtime.database.on_query = away
    await patient.conversation("warm").append({}, id="m-1")
    assert await shown(patient, conversation="warm") == ["m-0", "m-1"]
    with pytest.raises(Unavailable, match="away"):
        await shown(patient, conversation="cold")
    patient.runtime.database.on_query = None
    assert await shown(patient, conversation="cold") == ["m-0"]


async def test_no_views_where_they_are_switched_off(settings: Settings, redis: Redis) -> None:
    """`view_max_bytes` 0: every read asks Postgres, and nothing is kept."""
    async with Buffer.connect(settings.model_copy(update={"view_max_bytes": 0}), flusher=True) as buffer:
        await on_path(buffer, "stream")
        await buffer.conversation("c").append({}, id="m-0")
        await buffer.flush()
        with queries(buffer) as asked:
            assert await shown(buffer) == await shown(buffer) == ["m-0"]
        assert asked == [1, 1]
        assert await views(redis, buffer) == []
