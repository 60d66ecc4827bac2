"""Events: every listener hears everything once, in order, from whichever process, and can resume anywhere."""

from __future__ import annotations

import itertools
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack

import asyncpg
import pytest
from hypothesis import HealthCheck, given
from hypothesis import settings as given_settings
from hypothesis import strategies as st

from buffer import Buffer, InvalidRequest, NotFound, OutcomeUnknown, Settings
from buffer.read.history import History, Part
from tests.support.listeners import all_live, applied, listening, rest
from tests.support.paths import on_path
from tests.support.polling import eventually

NAMES = [f"m-{number}" for number in range(9)]

_numbers = itertools.count()


@pytest.fixture
async def other(settings: Settings, patient: Buffer) -> AsyncIterator[Buffer]:
    """Another process's buffer over the same servers."""
    async with Buffer.connect(settings) as buffer:
        await on_path(buffer, "stream")
        yield buffer


# --- what is heard


async def test_listener_hears_what_any_process_appends_from_now_on(patient: Buffer, other: Buffer) -> None:
    """Each item once with its id, position and time, in the order of acks; nothing older, nobody else's."""
    await patient.conversation("c").append({"n": -1}, id="before")
    async with listening(patient.conversation("c"), None) as heard:
        await all_live(patient, 1)
        receipts = []
        for number in range(20):
            by = (patient, other)[number % 2]
            receipts.append(await by.conversation("c").append({"n": number}, id=f"m-{number}"))
            await by.conversation("d").append({"n": number})
        events = await heard.count(20)
    items = (await patient.conversation("c").items(after="before")).items
    assert [event.item for event in events] == items == [{"n": number} for number in range(20)]
    for event, item, receipt in zip(events, items, receipts, strict=True):
        assert (event.type, event.removed_after) == ("appended", None)
        assert (event.item_id, event.position) == (receipt.id, receipt.position)
        assert event.item is not None
        assert (event.item.id, event.item.position) == (item.id, item.position)
        assert event.item.created_at == item.created_at


@pytest.mark.parametrize("where", ["tail", "both", "postgres", "direct"])
async def test_resuming_after_any_position_gives_the_rest(settings: Settings, where: str) -> None:
    """Wherever the items are by then; and what is appended afterwards follows."""
    slow = settings.model_copy(update={"flush_interval_seconds": 60.0})
    async with Buffer.connect(slow, flusher=where != "direct") as buffer:
        await on_path(buffer, "direct" if where == "direct" else "stream")
        conversation = buffer.conversation("c")
        receipts = []
        for number, name in enumerate(NAMES):
            receipts.append(await conversation.append({"n": number}, id=name))
            if (where, number) in {("both", 4), ("postgres", 8)}:
                await buffer.flush()
        positions = [receipt.position for receipt in receipts]
        afters = [0, *positions, positions[4] - 1]
        async with AsyncExitStack() as stack:
            heard = [await stack.enter_async_context(listening(conversation, after)) for after in afters]
            for one, after in zip(heard, afters, strict=True):
                await one.count(sum(position > after for position in positions))
            last = await conversation.append({"n": 9}, id="m-9")
            for one, after in zip(heard, afters, strict=True):
                expected = [*(r.id for r in receipts if r.position > after), "m-9"]
                await one.count(len(expected))
                assert one.ids == expected
                assert [event.position for event in one.events][-1] == last.position


async def test_history_longer_than_a_page_is_heard_whole(patient: Buffer) -> None:
    """Half of it flushed, with many deletions among it, which fill pages of their own."""
    conversation = patient.conversation("c")
    names = [f"m-{number}" for number in range(600)]
    await conversation.extend([{}] * 300, ids=names[:300])
    await patient.flush()
    await conversation.extend([{}] * 300, ids=names[300:])
    for name in names[:550:2]:
        await conversation.delete_item(name)
    left = [*names[1:550:2], *names[550:]]
    last = await patient.runtime.events.history.last_position("default", "c")
    events = await rest(conversation, 0, last)
    assert applied(events) == left
    assert [e.position for e in events] == sorted({e.position for e in events})
    assert sum(event.type == "deleted" for event in events) == 275


async def test_replacements_deletions_and_erasures_are_heard_live_and_later(patient: Buffer) -> None:
    """A later listener is not told of what is gone, but of what made it disappear."""
    conversation = patient.conversation("c")
    async with listening(conversation) as live:
        await all_live(patient, 1)
        positions = [(await conversation.append({"n": n}, id=f"m-{n}")).position for n in range(4)]
        replacing = await conversation.append({"n": 4}, id="m-4", replace_after="m-1")
        await conversation.delete_item("m-0")
        popped = await conversation.pop()
        assert popped is not None
        await live.count(7)
        assert [(e.type, e.item_id, e.removed_after) for e in live.events[4:]] == [
            ("appended", "m-4", positions[1]),
            ("deleted", "m-0", None),
            ("deleted", "m-4", None),
        ]
        later = await rest(conversation, 0, live.events[-1].position)
        assert [(e.type, e.item_id, e.removed_after) for e in later] == [
            ("appended", "m-1", None),
            ("deleted", None, positions[1]),
            ("deleted", "m-0", None),
            ("deleted", "m-4", None),
        ]
        assert later[1].position == replacing.position
        assert applied(live.events) == applied(later) == ["m-1"]
        erased = await conversation.delete()
        await conversation.append({"n": 5}, id="m-1")
        expected = [("deleted", None, erased.through), ("appended", "m-1", erased.through + 1)]
        events = (await live.count(9))[7:]
        for heard in (events, await rest(conversation, 0, events[-1].position)):
            assert [(e.type, e.item_id, e.position) for e in heard] == expected
        assert events[0].removed_after == 0


_CHANGES = st.lists(
    st.one_of(
        st.tuples(st.just("append"), st.integers(1, 3)),
        st.tuples(st.just("flush"), st.just(0)),
        st.tuples(st.just("replace"), st.integers(0, 20)),
        st.tuples(st.just("delete"), st.integers(0, 20)),
        st.tuples(st.just("erase"), st.just(0)),
    ),
    min_size=1,
    max_size=8,
)


@given_settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(changes=_CHANGES)
async def test_events_applied_to_what_a_client_had_are_what_is_there(
    patient: Buffer, changes: list[tuple[str, int]]
) -> None:
    """For one who listened all the time, and for those who left after any change and resume."""
    conversation = patient.conversation(f"any-{next(_numbers)}")
    history = patient.runtime.events.history
    had: list[tuple[int, list[tuple[int, str]]]] = [(0, [])]
    made = itertools.count()
    async with listening(conversation) as live:
        for what, number in changes:
            items = (await conversation.items(limit=1_000)).items
            if what == "append":
                await conversation.extend([{}] * number, ids=[f"m-{next(made)}" for _ in range(number)])
            elif what == "flush":
                await patient.flush()
            elif what == "erase":
                await conversation.delete()
            elif items and what == "replace":
                replaced = items[number % len(items)].id
                await conversation.append({}, id=f"m-{next(made)}", replace_after=replaced)
            elif items:
                await conversation.delete_item(items[number % len(items)].id)
            at = await history.last_position("default", conversation.id)
            had.append((at, [(i.position, i.id) for i in (await conversation.items(limit=1_000)).items]))
        end = (await conversation.append({}, id="end")).position
        there = [item.id for item in (await conversation.items(limit=1_000)).items]
        await eventually(lambda: live.ids and live.ids[-1] == "end")
        assert applied(live.events) == there
        positions = [event.position for event in live.events]
        assert positions == sorted(set(positions))
    for at, items in had:
        assert applied(await rest(conversation, at, end), items) == there


@pytest.fixture
async def stalled(settings: Settings) -> AsyncIterator[Buffer]:
    """A buffer on the stream, with 250 flushed items in ``c``, one of them deleted; nobody flushes now."""
    async with Buffer.connect(settings) as buffer:
        async with Buffer.connect(settings, flusher=True):
            await on_path(buffer, "stream")
            await buffer.conversation("c").extend([{}] * 250, ids=[f"m-{n}" for n in range(250)])
            await buffer.conversation("c").delete_item("m-249")
        yield buffer
        async with Buffer.connect(settings, flusher=True):
            await buffer.flush()


async def test_removal_that_is_not_flushed_yet_hides_what_it_removes(stalled: Buffer) -> None:
    """As in every read; one page or many, deleted, replaced and erased."""
    conversation = stalled.conversation("c")
    history = stalled.runtime.events.history
    with pytest.raises(OutcomeUnknown):
        await conversation.delete_item("m-1", timeout=0.1)
    last = await history.last_position("default", "c")
    events = await rest(conversation, 0, last)
    assert len(events) == 250
    assert [e.item_id for e in events if e.type == "deleted"] == ["m-249", "m-1"]
    await conversation.append({}, id="new", replace_after="m-2")
    replaced = (await conversation.append({}, id="newer", replace_after="new")).position
    events = await rest(conversation, 0, replaced)
    assert applied(events) == ["m-0", "m-2", "new", "newer"]
    assert [e.item_id for e in events] == ["m-0", "m-2", "m-249", "m-1", "new", "newer"]
    with pytest.raises(NotFound):
        await conversation.item("m-1")
    with pytest.raises(NotFound):
        await conversation.item("m-100")
    with pytest.raises(OutcomeUnknown):
        await conversation.delete_item("new", timeout=0.1)
    last = await history.last_position("default", "c")
    events = await rest(conversation, events[1].position, last)
    assert [(e.type, e.item_id, e.removed_after is None) for e in events] == [
        ("deleted", "m-249", True),
        ("deleted", "m-1", True),
        ("deleted", None, False),
        ("appended", "newer", False),
        ("deleted", "new", True),
    ]
    with pytest.raises(OutcomeUnknown):
        await conversation.delete(timeout=0.1)
    last = await history.last_position("default", "c")
    events = await rest(conversation, 0, last)
    assert [(e.type, e.item_id, e.removed_after) for e in events] == [("deleted", None, 0)]


@pytest.mark.parametrize("after", [-1, 1 << 63, "m-1", 1.5])
async def test_impossible_position_is_refused_at_once(patient: Buffer, after: int) -> None:
    """Not only when the first event is asked for."""
    with pytest.raises(InvalidRequest, match="after"):
        patient.conversation("c").events(after)


# --- what is kept


async def test_what_a_listener_was_shown_is_retained_until_it_is_flushed(
    patient: Buffer, other: Buffer
) -> None:
    """By the process that showed it: what a client has seen must not go with the one that accepted it."""
    async with listening(other.conversation("c")) as heard:
        await all_live(other, 1)
        await patient.conversation("c").append({}, id="m-1")
        await heard.count(1)
        assert other.runtime.member.retention.turns == 1
        await patient.flush()
        await eventually(lambda: other.runtime.member.retention.turns == 0)


async def test_process_that_may_be_judged_dead_shows_nothing(
    patient: Buffer, other: Buffer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What it would show then, nobody might bring; it goes on once it is known to live."""
    async with listening(other.conversation("c")) as heard:
        await all_live(other, 1)
        with monkeypatch.context() as patch:
            patch.setattr(other.runtime.member, "permitted", lambda: False)
            await patient.conversation("c").append({}, id="m-1")
            await eventually(lambda: not any(f._live for f in other.runtime.events._followers.values()))
            assert heard.events == []
        await heard.count(1)


async def test_nothing_is_told_while_something_before_it_may_be_missing(
    settings: Settings, postgres: asyncpg.Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A missing process may bring older items; told in the wrong order they would be skipped."""
    looks: list[Part] = []
    after = History.after

    async def noted(*args: object) -> Part:
        looks.append(await after(*args))
        return looks[-1]

    monkeypatch.setattr(History, "after", noted)
    async with Buffer.connect(settings) as buffer:
        await postgres.execute("insert into buffer.missing select shard, 'gone' from buffer.shards")
        await buffer.conversation("c").append({}, id="m-1")
        async with listening(buffer.conversation("c")) as heard:
            await eventually(lambda: len(looks) >= 3)
            assert heard.events == []
            await postgres.execute("delete from buffer.missing")
            await heard.count(1)
