"""Reads: cursors both ways, one sequence over both stores, and nothing of anybody else."""

from __future__ import annotations

import asyncio
import contextlib
from typing import Any

import pytest
from redis.asyncio import Redis

from buffer import Buffer, BufferError, InvalidRequest, NotFound, Receipt, Settings, Unavailable
from tests.support.paths import on_path

ITEMS = 9
NAMES = [f"m-{i}" for i in range(ITEMS)]


async def _fill(buffer: Buffer, flushed: int, conversation: str = "c") -> list[Receipt]:
    """Nine items, the first ``flushed`` of them in Postgres only, the rest in the tail only."""
    target = buffer.conversation(conversation)
    receipts = []
    for number, name in enumerate(NAMES):
        if number == flushed:
            await buffer.flush()
        receipts.append(await target.append({"n": number}, id=name))
    if flushed == ITEMS:
        await buffer.flush()
    return receipts


SPLITS = pytest.mark.parametrize("flushed", [0, 4, ITEMS], ids=["tail", "both", "postgres"])


@SPLITS
@pytest.mark.parametrize("by", ["id", "position"])
async def test_cursors_select_the_same_items_wherever_they_are(
    patient: Buffer, flushed: int, by: str
) -> None:
    """Every combination of after, before, limit and order gives the slice that a list would give."""
    receipts = await _fill(patient, flushed)
    conversation = patient.conversation("c")

    def cursor(index: int | None) -> Any:
        if index is None:
            return None
        return receipts[index].id if by == "id" else receipts[index].position

    for order in ("asc", "desc"):
        for after in (None, 0, 3, 4, 8):
            for before in (None, 0, 4, 5, 8):
                for limit in (1, 3, 9, 100):
                    page = await conversation.items(
                        after=cursor(after), before=cursor(before), limit=limit, order=order
                    )
                    assert ([i.id for i in page.items], page.has_more) == _expected(
                        after, before, limit, order
                    )


def _expected(after: int | None, before: int | None, limit: int, order: str) -> tuple[list[str], bool]:
    names = NAMES if order == "asc" else NAMES[::-1]
    start = 0 if after is None else names.index(NAMES[after]) + 1
    end = len(names) if before is None else names.index(NAMES[before])
    part = names[start:end]
    chosen = part[-limit:] if before is not None and after is None else part[:limit]
    return chosen, len(part) > limit


@SPLITS
async def test_walking_by_last_id_visits_every_item_once(patient: Buffer, flushed: int) -> None:
    """The last id of a page is the cursor of the next, in both orders."""
    await _fill(patient, flushed)
    for order in ("asc", "desc"):
        seen: list[str] = []
        page = await patient.conversation("c").items(limit=2, order=order)
        while True:
            seen += [item.id for item in page.items]
            if not page.has_more:
                break
            page = await patient.conversation("c").items(limit=2, order=order, after=page.last_id)
        assert seen == (NAMES if order == "asc" else NAMES[::-1])


@SPLITS
async def test_context_is_the_newest_turns_oldest_first(patient: Buffer, flushed: int) -> None:
    """Of any number of turns, with the last position."""
    receipts = await _fill(patient, flushed)
    for turns in (1, 4, 5, 6, 9, 1_000):
        context = await patient.conversation("c").context(turns)
        assert [item.id for item in context.items] == NAMES[-turns:]
        assert (context.last_position, context.complete) == (receipts[-1].position, True)


async def test_item_carries_id_position_and_time_beside_its_body(patient: Buffer) -> None:
    """The body is exactly what was appended; the rest are attributes; the same from both stores."""
    receipt = await patient.conversation("c").append({"role": "user"}, id="m-1")
    (unflushed,) = (await patient.conversation("c").items()).items
    await patient.flush()
    (flushed,) = (await patient.conversation("c").items()).items
    assert unflushed == flushed == {"role": "user"}
    assert unflushed.id == flushed.id == "m-1"
    assert unflushed.position == flushed.position == receipt.position
    assert unflushed.created_at == flushed.created_at is not None


async def test_empty_conversation_is_an_empty_page(patient: Buffer) -> None:
    """One that nobody has appended to has no items, and no error."""
    page = await patient.conversation("nobody").items()
    assert (page.items, page.has_more, page.first_id, page.last_id) == ([], False, None, None)
    assert (await patient.conversation("nobody").context()).last_position is None


@pytest.mark.parametrize(
    "arguments", [{"limit": 0}, {"limit": 1_001}, {"limit": "7"}, {"order": "up"}, {"after": ""}]
)
async def test_impossible_page_is_refused(patient: Buffer, arguments: dict[str, Any]) -> None:
    """The error names the argument."""
    with pytest.raises(InvalidRequest, match=next(iter(arguments))):
        await patient.conversation("c").items(**arguments)


@pytest.mark.parametrize("flushed", [False, True])
async def test_cursor_of_an_unknown_item_is_not_found(patient: Buffer, flushed: bool) -> None:
    """An item of another conversation is not known here."""
    await patient.conversation("other").append({}, id="m-1")
    await patient.conversation("c").append({}, id="m-2")
    if flushed:
        await patient.flush()
    with pytest.raises(NotFound, match="m-1"):
        await patient.conversation("c").items(after="m-1")


async def test_tail_of_many_chunks_is_one_sequence(patient: Buffer) -> None:
    """More unflushed items than one round trip brings, and more flushed ones before them."""
    conversation = patient.conversation("c")
    names = [f"m-{number:04}" for number in range(750)]
    await conversation.extend([{}] * 250, ids=names[:250])
    await patient.flush()
    await conversation.extend([{}] * 500, ids=names[250:])
    for limit in (99, 100, 101, 499, 500, 501, 1_000):
        assert [i.id for i in (await conversation.context(limit)).items] == names[-limit:]
        assert [i.id for i in (await conversation.items(limit=limit)).items] == names[:limit]
    middle = await conversation.items(after=names[200], before=names[300], limit=1_000)
    assert [i.id for i in middle.items] == names[201:300]


async def test_replaced_items_are_gone_across_chunks_and_stores(patient: Buffer) -> None:
    """A removal in the newest chunk hides items in older chunks and in Postgres."""
    conversation = patient.conversation("c")
    names = [f"m-{number:04}" for number in range(400)]
    await conversation.extend([{}] * 100, ids=names[:100])
    await patient.flush()
    await conversation.extend([{}] * 300, ids=names[100:])
    await conversation.append({}, id="new", replace_after=names[50])
    expected = [*names[:51], "new"]
    for _ in range(2):
        assert [i.id for i in (await conversation.items(limit=1_000)).items] == expected
        page = await conversation.items(limit=3, order="desc")
        assert ([i.id for i in page.items], page.has_more) == (expected[:-4:-1], True)
        await patient.flush()


async def test_every_read_during_flushes_is_one_whole_sequence(settings: Settings) -> None:
    """While batches of a few items move over, each read has every item that was acked before it."""
    busy = settings.model_copy(update={"flush_interval_seconds": 0.005, "flush_max_turns": 3})
    async with Buffer.connect(busy, flusher=True) as buffer:
        conversation = buffer.conversation("c")
        acked: list[str] = []

        async def read() -> None:
            while len(acked) < 300:
                least = len(acked)
                items = (await conversation.items(limit=1_000)).items
                numbers = [item["n"] for item in items]
                assert numbers == list(range(len(numbers)))
                assert len(numbers) >= least

        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(read())
            for number in range(300):
                receipt = await conversation.append({"n": number})
                acked.append(receipt.id)


# --- who sees what

ODD_IDS = [
    "c", ":", "c:", "{", "}", "{0}", "{c}", "*", "?", "[a-z]", "%", "_", "\\", "'", '"', "$1", " ", "...",
    "C", "é", "e\u0301", "\N{GRINNING FACE}", "\u202e", "c\u200b", "default", "-1", "0", "null",
]  # fmt: skip


@pytest.mark.parametrize("flushed", [False, True])
async def test_no_two_ids_ever_meet(patient: Buffer, redis: Redis, flushed: bool) -> None:
    """Tenants, conversations and items of odd names: each reads its own and nothing else."""
    pairs = [(tenant, name) for tenant in ODD_IDS for name in ODD_IDS]
    await asyncio.gather(
        *(
            patient.conversation(name, tenant=tenant).append({"of": [tenant, name]}, id=name)
            for tenant, name in pairs
        )
    )
    if flushed:
        await patient.flush()
    pages = await asyncio.gather(
        *(patient.conversation(name, tenant=tenant).items() for tenant, name in pairs)
    )
    for (tenant, name), page in zip(pairs, pages, strict=True):
        assert [(item.id, dict(item)) for item in page.items] == [(name, {"of": [tenant, name]})]
    prefix = patient.settings.key_prefix
    keys = [key async for key in redis.scan_iter(match=f"{prefix}:*")]
    tags = {f"{prefix}:{{{shard}}}:".encode() for shard in range(patient.settings.shards)}
    assert all(any(key.startswith(tag) for tag in tags) for key in keys), "an id found its way into a key"


@pytest.mark.parametrize("flushed", [False, True])
async def test_nothing_of_another_tenant_is_readable(patient: Buffer, flushed: bool) -> None:
    """Not by the same conversation id, an item id, or a position."""
    theirs = patient.conversation("c", tenant="them")
    receipt = await theirs.append({"secret": True}, id="m-1")
    if flushed:
        await patient.flush()
    ours = patient.conversation("c", tenant="us")
    assert not (await ours.items()).items
    assert not (await ours.items(before=receipt.position + 1)).items
    assert not (await ours.context()).items
    with pytest.raises(NotFound):
        await ours.items(after="m-1")
    with pytest.raises(NotFound):
        await ours.append({}, replace_after="m-1")


async def test_unreadable_store_is_an_error_and_never_an_empty_page(patient: Buffer, redis: Redis) -> None:
    """Redis without its grant: a read fails, or shows the item once the service goes on without Redis."""
    await patient.conversation("c").append({}, id="m-1", durability="stored")
    keys = patient.runtime.shards.keys[patient.conversation("c")._target.shard]
    await redis.hdel(keys.shard, "epoch")
    for _ in range(50):
        with contextlib.suppress(BufferError):
            assert (await patient.conversation("c").items()).items
            assert (await patient.conversation("c").context()).items
    await on_path(patient, "stream")
    assert (await patient.conversation("c").items()).items


async def test_item_that_a_newer_release_wrote_is_an_error_until_it_is_flushed(
    patient: Buffer, redis: Redis
) -> None:
    """Not an answer without it, and not somebody else's exception."""
    conversation = patient.conversation("c")
    await conversation.append({}, id="m-1")
    shard = conversation._target.shard
    (backlog,) = await patient.runtime.shards.peek([shard])
    keys = patient.runtime.shards.keys[shard]
    entry = await redis.xadd(keys.stream, {"h": "2/new/0", "d": "{}"}, id=f"{backlog.epoch}-*")
    await redis.hset(keys.shard, "default/c", entry.split(b"-")[1])
    with pytest.raises(Unavailable, match="newer release"):
        await conversation.items()
    with pytest.raises(Unavailable, match="newer release"):
        await conversation.context()
