"""Deleting an item, popping the latest one, erasing a conversation or a user: gone, and gone for good."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack

import asyncpg
import pytest

from buffer import Buffer, Conflict, NotFound, PreconditionFailed, Settings
from tests.support.paths import on_path

NAMES = [f"m-{number}" for number in range(6)]


@pytest.fixture(params=["tail", "both", "postgres", "direct"])
async def filled(request: pytest.FixtureRequest, settings: Settings) -> AsyncIterator[Buffer]:
    """Six items in ``c``, one in ``other``: unflushed, half flushed, flushed, or appended directly."""
    patient = settings.model_copy(update={"flush_interval_seconds": 60.0})
    where = request.param
    async with AsyncExitStack() as stack:
        buffer = await stack.enter_async_context(Buffer.connect(patient, flusher=where != "direct"))
        await on_path(buffer, "direct" if where == "direct" else "stream")
        for name in NAMES:
            if (where, name) == ("both", "m-3"):
                await buffer.flush()
            await buffer.conversation("c", user="u1").append({"name": name}, id=name)
        await buffer.conversation("other", user="u2").append({"name": "x"}, id="m-0")
        if where == "postgres":
            await buffer.flush()
        yield buffer


async def names(buffer: Buffer, conversation: str = "c") -> list[str]:
    """What a page and a context show, which must be the same."""
    target = buffer.conversation(conversation)
    page = [item.id for item in (await target.items()).items]
    context = await target.context(100)
    assert [item.id for item in context.items] == page
    assert context.complete
    return page


async def test_a_deleted_item_is_gone_from_every_read(filled: Buffer) -> None:
    """Whichever store had it; the others stay, and a second deletion finds nothing."""
    conversation = filled.conversation("c")
    for name, left in [("m-4", 5), ("m-0", 4), ("m-5", 3)]:
        await conversation.delete_item(name)
        assert name not in (shown := await names(filled))
        assert len(shown) == left
        with pytest.raises(NotFound, match=name):
            await conversation.delete_item(name)
    assert await names(filled) == ["m-1", "m-2", "m-3"]
    assert await names(filled, "other") == ["m-0"]


async def test_a_deleted_items_id_is_not_used_again(filled: Buffer, postgres: asyncpg.Connection) -> None:
    """A repeat of its append stores nothing, another body is a conflict; Postgres has no content of it."""
    conversation = filled.conversation("c")
    await conversation.delete_item("m-2")
    with pytest.raises(Conflict):
        await conversation.append({"name": "another"}, id="m-2")
    assert "m-2" not in await names(filled)
    assert await postgres.fetchval("select data from buffer.items where item_id = 'm-2'") is None
    assert await postgres.fetchval("select count(*) from buffer.items where item_id = 'm-2'") == 1


async def test_pop_takes_the_latest_item_until_none_is_left(filled: Buffer) -> None:
    """Newest first, each with its body; an append in between is the latest then."""
    conversation = filled.conversation("c")
    popped = await conversation.pop()
    assert popped is not None
    assert (popped.id, popped["name"]) == ("m-5", "m-5")
    await conversation.append({"name": "new"}, id="m-6")
    for name in ["m-6", "m-4", "m-3", "m-2", "m-1", "m-0"]:
        popped = await conversation.pop()
        assert popped is not None
        assert popped.id == name
    assert await conversation.pop() is None
    assert await names(filled) == []
    assert await names(filled, "other") == ["m-0"]


async def test_concurrent_pops_take_different_items(filled: Buffer) -> None:
    """Four at a time, with an append beside them: nothing is popped twice, and nothing is lost."""
    conversation = filled.conversation("c")
    async with asyncio.TaskGroup() as tasks:
        pops = [tasks.create_task(conversation.pop()) for _ in range(4)]
        tasks.create_task(conversation.append({"name": "new"}, id="m-6"))
    taken = [item.id for pop in pops if (item := pop.result()) is not None]
    assert len(set(taken)) == 4
    assert sorted(taken + await names(filled)) == [*NAMES, "m-6"]


async def test_if_match_sees_deletions_as_the_context_does(filled: Buffer) -> None:
    """The last position of a context is the one that a conditional append must name, whatever was removed."""
    conversation = filled.conversation("c")
    before = await conversation.context()
    await conversation.pop()
    after = await conversation.context()
    with pytest.raises(PreconditionFailed):
        await conversation.append({}, if_match=before.last_position)
    await filled.flush()
    assert (await conversation.context()).last_position == after.last_position
    await conversation.append({}, id="m-7", if_match=after.last_position)
    assert (await names(filled))[-2:] == ["m-4", "m-7"]


async def test_an_erased_conversation_is_gone_and_begins_anew(
    filled: Buffer, postgres: asyncpg.Connection
) -> None:
    """Nothing of it is left in Postgres but a tombstone without content; ids may be used again."""
    conversation = filled.conversation("c")
    last = (await conversation.context()).last_position
    assert last is not None
    erased = await conversation.delete()
    assert (erased.conversation, erased.through > last) == ("c", True)
    assert await names(filled) == []
    context = await conversation.context()
    assert context.last_position is None
    for table in ("items", "removals", "dead_letters", "conversations"):
        assert await postgres.fetchval(f"select count(*) from buffer.{table} where conversation = 'c'") == 0
    assert await names(filled, "other") == ["m-0"]

    first = await conversation.append({"name": "anew"}, id="m-3", if_match=0)
    assert (first.duplicate, first.position > erased.through) == (False, True)
    assert await names(filled) == ["m-3"]
    await filled.flush()
    assert await names(filled) == ["m-3"]
    assert (await conversation.items()).items[0]["name"] == "anew"
    known = await postgres.fetchval("select count(*) from buffer.conversations where conversation = 'c'")
    assert known == 1


async def test_appends_racing_with_an_erase_are_covered_or_stay(filled: Buffer) -> None:
    """Each acked position at or before the receipt's is gone, each later one is there; ids as before."""
    conversation = filled.conversation("c")
    acked = {}

    async def append(name: str) -> None:
        receipt = await conversation.append({"name": name}, id=name)
        acked[name] = receipt

    async with asyncio.TaskGroup() as tasks:
        for number in range(20):
            tasks.create_task(append(f"n-{number}"))
        erasure = tasks.create_task(conversation.delete())
        for name in NAMES:
            tasks.create_task(append(name))
        for number in range(20, 40):
            tasks.create_task(append(f"n-{number}"))
    through = erasure.result().through
    left = [r.id for r in sorted(acked.values(), key=lambda r: r.position) if r.position > through]
    assert await names(filled) == left
    await filled.flush()
    assert await names(filled) == left


async def test_an_id_from_before_the_erase_is_new_in_every_batch(filled: Buffer) -> None:
    """Erase and append again, ten times over, with the same ids: every time all of them are stored."""
    conversation = filled.conversation("c")
    for turn in range(10):
        await conversation.delete()
        receipts = await conversation.extend([{"turn": turn, "name": name} for name in NAMES], ids=NAMES)
        assert not any(receipt.duplicate for receipt in receipts)
        assert await names(filled) == NAMES
    assert {item["turn"] for item in (await conversation.items()).items} == {9}


async def test_erasing_a_user_takes_every_conversation_of_the_user(
    filled: Buffer, postgres: asyncpg.Connection
) -> None:
    """The ones of others stay; the receipt names each with its last position."""
    for number in range(70):
        await filled.conversation(f"more-{number}", user="u1").append({"n": number})
    erased = await filled.delete_user("u1")
    assert {e.conversation for e in erased} == {"c", *(f"more-{number}" for number in range(70))}
    assert await names(filled) == await names(filled, "more-69") == []
    assert await names(filled, "other") == ["m-0"]
    assert await postgres.fetchval("select count(*) from buffer.user_tombstones where user_id = 'u1'") == 1
    assert await filled.delete_user("u1") == []
