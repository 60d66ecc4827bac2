"""Which conversations are looked up, by what a flusher sees pass."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from buffer.store.shards import Owned
from buffer.summaries import counts as counts_module
from buffer.summaries.counts import Counts

SHARD = Owned(0, fence=1, path_epoch=1, flushed_through=0)


def look_up(counts: Counts, uncovered: dict[bytes, int]) -> set[bytes]:
    """What Postgres would be asked, and its answer."""
    taken = counts.take(1_000)
    counts.learn(taken, uncovered)
    return set(taken)


def test_unknown_conversation_is_looked_up_once_and_counted_from_there() -> None:
    """Once more when there are enough, which makes it due; then from the newest items on."""
    counts = Counts(enough=10, keep=4)
    counts.add(SHARD, [b"c"] * 3, ())
    assert look_up(counts, {b"c": 3}) == {b"c"}
    for _ in range(6):
        counts.add(SHARD, [b"c"], ())
        assert not counts.waiting
    counts.add(SHARD, [b"c"], ())
    assert look_up(counts, {b"c": 10}) == {b"c"}
    counts.add(SHARD, [b"c"] * 5, ())
    assert not counts.waiting
    counts.add(SHARD, [b"c"], ())
    assert look_up(counts, {b"c": 10}) == {b"c"}


@pytest.mark.parametrize("later", [SHARD._replace(fence=2), SHARD._replace(path_epoch=2)])
def test_what_others_may_have_flushed_in_between_is_looked_up(later: Owned) -> None:
    """The shard was somebody else's, or items were appended directly."""
    counts = Counts(enough=10, keep=4)
    counts.add(SHARD, [b"c", b"d"], ())
    look_up(counts, {b"c": 1, b"d": 1})
    counts.add(later, [b"c"], ())
    assert look_up(counts, {b"c": 2}) == {b"c"}
    counts.add(later, [b"c"], ())
    assert not counts.waiting


def test_conversation_that_lost_items_is_looked_up() -> None:
    """Its summary may be gone."""
    counts = Counts(enough=10, keep=4)
    counts.add(SHARD, [b"c", b"d"], ())
    look_up(counts, {b"c": 1, b"d": 1})
    counts.add(SHARD, [b"c", b"d"], {b"c"})
    assert look_up(counts, {}) == {b"c"}


def test_items_that_come_during_a_look_up_are_not_forgotten() -> None:
    """The answer may not know them: it is asked once more. What cannot be asked stays to be asked."""
    counts = Counts(enough=10, keep=4)
    counts.add(SHARD, [b"c"], ())
    taken = counts.take(1_000)
    counts.add(SHARD, [b"c"] * 9, ())
    counts.learn(taken, {b"c": 1})
    taken = counts.take(1_000)
    assert set(taken) == {b"c"}
    counts.put_back(taken)
    assert look_up(counts, {b"c": 10}) == {b"c"}


def test_memory_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    """The longest unseen are forgotten, and looked up when they are seen again."""
    monkeypatch.setattr(counts_module, "_MOST", 10)
    counts = Counts(enough=10, keep=4)
    keys = [b"%d" % number for number in range(25)]
    for key in keys:
        counts.add(SHARD, [key], ())
    assert counts.waiting == 10
    look_up(counts, dict.fromkeys(keys, 1))
    counts.add(SHARD, keys[15:20], ())
    counts.add(SHARD, [b"new"], ())
    look_up(counts, {b"new": 1})
    counts.add(SHARD, keys[15:20], ())
    assert not counts.waiting
    counts.add(SHARD, keys[20:21], ())
    assert counts.waiting


@given(st.lists(st.lists(st.sampled_from([b"a", b"b", b"c"]), max_size=6), max_size=30), st.integers(1, 4))
def test_every_conversation_with_enough_is_looked_up(batches: list[list[bytes]], at_a_time: int) -> None:
    """Against a plain count of what was committed, with look-ups at any moment."""
    counts = Counts(enough=5, keep=2)
    uncovered = dict.fromkeys([b"a", b"b", b"c"], 0)
    for batch in batches:
        for key in batch:
            uncovered[key] += 1
        counts.add(SHARD, batch, ())
        taken = counts.take(at_a_time)
        counts.learn(taken, uncovered)
        for key in taken:
            if uncovered[key] >= 5:
                uncovered[key] = 2  # a summary is made
        waiting = counts.take(1_000)
        counts.put_back(waiting)
        assert all(key in waiting for key, count in uncovered.items() if count >= 5)
