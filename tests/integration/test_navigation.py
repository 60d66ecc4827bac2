"""Single items, and pages walked both ways, over the tail and Postgres as one sequence."""

from __future__ import annotations

import itertools
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from typing import Any

import asyncpg
import pytest
from hypothesis import HealthCheck, given
from hypothesis import settings as given_settings
from hypothesis import strategies as st

from buffer import Buffer, Conversation, InvalidRequest, NotFound, Page, Settings, Unavailable
from tests.support.paths import on_path
from tests.support.polling import eventually

_numbers = itertools.count()


@pytest.fixture(params=["tail", "postgres", "direct"])
async def somewhere(request: pytest.FixtureRequest, settings: Settings) -> AsyncIterator[Buffer]:
    """A buffer whose appends stay in the tail, go to Postgres at once (``flushed``), or directly."""
    interval = 0.01 if request.param == "postgres" else 60.0
    patient = settings.model_copy(update={"flush_interval_seconds": interval})
    async with AsyncExitStack() as stack:
        direct = request.param == "direct"
        buffer = await stack.enter_async_context(Buffer.connect(patient, flusher=not direct))
        await on_path(buffer, "direct" if direct else "stream")
        yield buffer


async def test_item_is_got_by_its_id_wherever_it_is(somewhere: Buffer) -> None:
    """Body, id, position and time are those of a page; another conversation's items are not found."""
    conversation = somewhere.conversation("c")
    for number in range(3):
        receipt = await conversation.append({"n": number}, id=f"m-{number}")
        item = await conversation.item(f"m-{number}")
        (shown,) = (await conversation.items(order="desc", limit=1)).items
        assert item == shown == {"n": number}
        assert (item.id, item.position) == (receipt.id, receipt.position)
        assert item.created_at == shown.created_at is not None
    with pytest.raises(NotFound, match="m-0"):
        await somewhere.conversation("other").item("m-0")
    with pytest.raises(NotFound, match="m-0"):
        await somewhere.conversation("c", tenant="them").item("m-0")
    with pytest.raises(NotFound, match="nothing"):
        await conversation.item("nothing")
    with pytest.raises(InvalidRequest, match="item_id"):
        await conversation.item("")


async def test_removed_item_is_not_found(somewhere: Buffer) -> None:
    """Replaced, deleted or erased, at once and after its flush; one that took its id anew is found."""
    conversation = somewhere.conversation("c")
    for name in ("a", "b", "c"):
        await conversation.append({"name": name}, id=name)
    await conversation.append({"name": "d"}, id="d", replace_after="b")
    await conversation.delete_item("a")
    for _ in range(2):
        for gone in ("a", "c"):
            with pytest.raises(NotFound):
                await conversation.item(gone)
        assert [(await conversation.item(name))["name"] for name in ("b", "d")] == ["b", "d"]
        await somewhere.flush()
    await conversation.delete()
    with pytest.raises(NotFound):
        await conversation.item("b")
    await conversation.append({"name": "new"}, id="b")
    assert (await conversation.item("b"))["name"] == "new"


async def test_item_flushed_while_it_is_asked_for_is_always_found(settings: Settings) -> None:
    """Small flushes without pause, and after each ack the item is there."""
    busy = settings.model_copy(update={"flush_interval_seconds": 0.005, "flush_max_turns": 2})
    async with Buffer.connect(busy, flusher=True) as buffer:
        conversation = buffer.conversation("c")
        for number in range(200):
            await conversation.append({"n": number}, id=f"m-{number}")
            for asked in {number, number // 2, 0}:
                assert (await conversation.item(f"m-{asked}"))["n"] == asked


async def test_item_that_may_be_with_a_missing_process_is_unavailable(
    somewhere: Buffer, postgres: asyncpg.Connection
) -> None:
    """Not found would be a lie; what is there is given all the same."""
    conversation = somewhere.conversation("c")
    await conversation.append({}, id="m-1", durability="stored")
    await postgres.execute("insert into buffer.missing select shard, 'gone' from buffer.shards")
    assert await conversation.item("m-1") == {}
    with pytest.raises(Unavailable):
        await conversation.item("m-2")
    await postgres.execute("delete from buffer.missing")


async def test_item_shown_from_the_tail_is_retained_by_the_process_that_shows_it(settings: Settings) -> None:
    """As with every read: what a client has seen must not go with the process that accepted it."""
    patient = settings.model_copy(update={"flush_interval_seconds": 60.0})
    async with Buffer.connect(patient, flusher=True) as one, Buffer.connect(patient) as other:
        await on_path(other, "stream")
        await one.conversation("c").append({}, id="m-1")
        assert other.runtime.member.retention.turns == 0
        await other.conversation("c").item("m-1")
        assert other.runtime.member.retention.turns == 1
        await one.flush()
        await eventually(lambda: other.runtime.member.retention.turns == 0)


# --- walks

_CHANGES = st.lists(
    st.one_of(
        st.tuples(st.just("append"), st.integers(1, 4)),
        st.tuples(st.just("flush"), st.just(0)),
        st.tuples(st.just("replace"), st.integers(0, 20)),
        st.tuples(st.just("delete"), st.integers(0, 20)),
    ),
    min_size=1,
    max_size=10,
)


async def _build(buffer: Buffer, changes: list[tuple[str, int]]) -> tuple[Conversation, list[str]]:
    """A conversation that was changed so, and the plain list that it should be."""
    conversation = buffer.conversation(f"walk-{next(_numbers)}")
    names: list[str] = []
    made = itertools.count()
    for what, number in changes:
        if what == "append":
            new = [f"m-{next(made)}" for _ in range(number)]
            await conversation.extend([{"of": name} for name in new], ids=new)
            names += new
        elif what == "flush":
            await buffer.flush()
        elif what == "replace" and names:
            at = number % len(names)
            name = f"m-{next(made)}"
            await conversation.append({"of": name}, id=name, replace_after=names[at])
            names = [*names[: at + 1], name]
        elif what == "delete" and names:
            await conversation.delete_item(names.pop(number % len(names)))
    return conversation, names


async def _walk(buffer: Buffer, conversation: Conversation, flush_at: int, **how: Any) -> list[str]:
    """Page by page by the last id; in front of one of the pages everything is flushed."""
    seen: list[str] = []
    page = Page(has_more=True)
    number = 0
    while page.has_more:
        if number == flush_at:
            await buffer.flush()
        page = await conversation.items(after=page.last_id, **how)
        assert page.complete
        assert all(item["of"] == item.id for item in page.items)
        assert len(page.items) == how["limit"] or not page.has_more
        seen += [item.id for item in page.items]
        number += 1
    return seen


@given_settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(changes=_CHANGES, limit=st.integers(1, 9), flush_at=st.integers(0, 4), forwards=st.booleans())
async def test_walk_of_any_conversation_is_the_plain_list(
    patient: Buffer, changes: list[tuple[str, int]], limit: int, flush_at: int, forwards: bool
) -> None:
    """Appended, replaced, deleted and flushed at will, with a flush in the middle of the walk, both ways."""
    conversation, names = await _build(patient, changes)
    order = "asc" if forwards else "desc"
    seen = await _walk(patient, conversation, flush_at, limit=limit, order=order)
    assert seen == (names if forwards else names[::-1])


async def test_walks_with_every_limit_agree_while_everything_is_being_flushed(settings: Settings) -> None:
    """Forwards and backwards, by `after` and by `before`, while small batches move over."""
    busy = settings.model_copy(update={"flush_interval_seconds": 0.01, "flush_max_turns": 5})
    async with Buffer.connect(busy, flusher=True) as buffer:
        conversation = buffer.conversation("c")
        names: list[str] = []
        for limit in range(1, 25):
            new = [f"m-{limit}-{n}" for n in range(6)]
            await conversation.extend([{"of": name} for name in new], ids=new)
            names += new
            assert await _walk(buffer, conversation, -1, limit=limit, order="asc") == names
            assert await _walk(buffer, conversation, -1, limit=limit, order="desc") == names[::-1]
            assert await _walk_to_the_front(conversation, limit, names[-1]) == names[:-1]


async def _walk_to_the_front(conversation: Conversation, limit: int, before: str | None) -> list[str]:
    """By `before` with ascending order: each page is the one that ends where the last one began."""
    seen: list[str] = []
    while True:
        page = await conversation.items(before=before, limit=limit)
        seen = [item.id for item in page.items] + seen
        if not page.has_more:
            return seen
        before = page.first_id
