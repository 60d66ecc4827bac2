"""The merge of Postgres and the tail: one prefix, wherever the flush stood and whenever the tail was read.

The model is a conversation as a plain list: an append adds an item, after removing what it replaces. Its
state after the first ``n`` entries of the shard is what a read must give whose newer store had seen ``n``.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from buffer.model.record import DELETE, ERASE, ITEM, Removal, removal
from buffer.policy.merge import (
    Pending,
    between,
    new_in_tail,
    newest_page,
    oldest_page,
    removals,
    unflushed,
    visible,
)


class Entry(NamedTuple):
    """One entry of a shard's stream. ``ours``: of the conversation that is read."""

    position: int
    item_id: str | None
    ours: bool
    removal: Removal | None


class Stored(NamedTuple):
    position: int
    item_id: str


def conversation_after(entries: list[Entry]) -> tuple[list[Stored], set[str]]:
    """The conversation's items after these entries, and every id that it has ever held."""
    items: list[Stored] = []
    known: set[str] = set()
    for entry in entries:
        if not entry.ours:
            continue
        if (removed := entry.removal) is not None:
            items = [item for item in items if not removed.covers(item.position)]
        if entry.item_id is not None and entry.item_id not in known:
            items.append(Stored(entry.position, entry.item_id))
            known.add(entry.item_id)
    return items, known


@dataclass
class History:
    """A shard's entries, and three moments of it, as positions: an entry at or before one has passed it.

    ``settled`` is where the tail began when it was read, ``read`` where it ended, and ``flushed`` what
    Postgres had when it was asked afterwards.
    """

    entries: list[Entry]
    settled: int
    read: int
    flushed: int

    @property
    def tail(self) -> list[Pending]:
        return [
            Pending(entry.position, entry.item_id, entry.removal)
            for entry in self.entries
            if entry.ours and self.settled < entry.position <= self.read
        ]

    def until(self, position: int) -> tuple[list[Stored], set[str]]:
        return conversation_after([entry for entry in self.entries if entry.position <= position])


@st.composite
def histories(draw: st.DrawFn, *, repeats: bool = True) -> History:
    """Two conversations: appends, some of which replace, or repeat an id of long ago; deletions, erasures.

    A repeat carries no removal: what it removed, it removed the first time.
    """
    count = draw(st.integers(0, 14))
    first = draw(st.sampled_from([1 << 40, 7 << 40]))
    settled = draw(st.integers(-1, count - 1))
    entries: list[Entry] = []
    for number in range(count):
        position = first + number
        ours = draw(st.integers(0, 3)) > 0
        old = [e.item_id for e in entries if e.ours and e.item_id and e.position <= first + settled]
        if repeats and ours and old and number > settled and draw(st.integers(0, 4)) == 0:
            entries.append(Entry(position, draw(st.sampled_from(old)), ours, None))
            continue
        kind = draw(st.sampled_from([ITEM, ITEM, ITEM, ITEM, DELETE, ERASE])) if number else ITEM
        cut = draw(st.none() | st.integers(first - 1, position - 1)) if number and kind == ITEM else None
        if kind == DELETE:
            cut = draw(st.integers(first, position - 1))
        item_id = f"item-{number}" if kind == ITEM else None
        entries.append(Entry(position, item_id, ours, removal(kind, cut, position)))
    read = draw(st.integers(settled, count - 1))
    flushed = draw(st.integers(settled, count - 1))
    return History(entries, first + settled, first + read, first + flushed)


def stored_part(history: History, after: int, before: int) -> tuple[list[Stored], set[str]]:
    """What Postgres answers: its items less those that the tail removes, and the tail's ids that it has."""
    items, known = history.until(history.flushed)
    removed = removals(history.tail)
    found = [i for i in items if after < i.position < before and visible(i.position, removed)]
    return found, known & {pending.item_id for pending in history.tail if pending.item_id}


def tail_part(history: History, known: set[str], after: int, before: int) -> list[Stored]:
    new = new_in_tail(history.tail, history.flushed, known)
    return [Stored(pending.position, pending.item_id or "") for pending in between(new, after, before)]


EVERYTHING = (-2, 1 << 62)


@given(histories())
def test_a_read_is_one_prefix_whatever_was_flushed_meanwhile(history: History) -> None:
    """Tail and Postgres together are the conversation as of the newer of the two, without gap or repeat."""
    stored, known = stored_part(history, *EVERYTHING)
    merged = stored + tail_part(history, known, *EVERYTHING)
    expected, _ = history.until(max(history.read, history.flushed))
    assert merged == expected
    assert len({item.item_id for item in merged}) == len(merged)
    assert sorted(merged) == merged


@settings(max_examples=250)
@given(histories(), st.data(), st.integers(1, 4))
def test_a_page_is_a_part_of_that_prefix_and_says_whether_there_is_more(
    history: History, data: st.DataObject, limit: int
) -> None:
    """Between any two positions, from either end, where Postgres gives one item over the limit at most."""
    base = history.entries[0].position if history.entries else 0
    after = data.draw(st.just(0) | st.integers(base - 2, base + 14))
    before = data.draw(st.just(1 << 62) | st.integers(base - 1, base + 15))
    stored, known = stored_part(history, after, before)
    new = tail_part(history, known, after, before)
    whole, _ = history.until(max(history.read, history.flushed))
    expected = [item for item in whole if after < item.position < before]
    more = len(expected) > limit
    assert newest_page(stored[-limit - 1 :], new, limit) == (expected[-limit:], more)
    assert oldest_page(stored[: limit + 1], new, limit) == (expected[:limit], more)


@given(histories(repeats=False), st.data())
def test_the_newest_part_of_the_tail_is_right_by_itself(history: History, data: st.DataObject) -> None:
    """A reader that stops after the newest chunk of a tail has what the whole tail would have given it."""
    tail = history.tail
    chunk = tail[data.draw(st.integers(0, len(tail))) :]
    begins = chunk[0].position if chunk else history.read + 1
    whole, _ = history.until(history.read)
    expected = [item for item in whole if item.position >= begins]
    assert [Stored(p.position, p.item_id or "") for p in unflushed(chunk, 0)] == expected


@given(histories())
def test_a_tail_that_is_flushed_altogether_adds_nothing(history: History) -> None:
    """Postgres has the last word about everything up to its mark."""
    assert unflushed(history.tail, max(history.read, history.flushed)) == []


@pytest.mark.parametrize(("position", "removed"), [(4, False), (5, False), (6, True), (9, True), (10, False)])
def test_a_removal_spares_the_item_it_names_and_the_one_that_carries_it(
    position: int, *, removed: bool
) -> None:
    """``replace_after`` keeps its own item; the replacement is not removed by itself."""
    assert Removal(after=5, before=10).covers(position) == removed
    assert visible(position, [Removal(0, 2), Removal(5, 10)]) != removed


def test_bounds_of_a_page_are_excluded() -> None:
    """An item named by ``after`` or ``before`` is not on the page."""
    tail = [Pending(position, f"item-{position}", None) for position in range(1, 6)]
    assert [p.position for p in between(tail, 2, 5)] == [3, 4]
    assert between(tail, 2, 3) == []


def test_a_replacement_removes_flushed_and_unflushed_items_alike() -> None:
    """Items 1 to 3 of which 1 and 2 are flushed; 4 replaces what follows 1: 1 and 4 remain."""
    tail = [Pending(2, "b", None), Pending(3, "c", None), Pending(4, "d", Removal(1, 4))]
    assert removals(tail) == [Removal(1, 4)]
    assert [p.item_id for p in unflushed(tail, 2)] == ["d"]
    assert [visible(position, removals(tail)) for position in (1, 2)] == [True, False]


def test_a_repeat_of_a_stored_item_stays_where_it_was_first() -> None:
    """An id that Postgres has, from before the idempotency window, is not shown a second time."""
    tail = [Pending(8, "old", None), Pending(9, "new", None)]
    assert [p.item_id for p in new_in_tail(tail, 5, {"old"})] == ["new"]
