"""Retention: nothing is let go of before a mark of its own epoch, and the account comes out even."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime, timedelta

import pytest
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from buffer.model.position import epoch_of, pack, sequence_of
from buffer.model.record import encode_header
from buffer.path.retention import OVERHEAD_BYTES, Retention
from buffer.store.placing import Placed
from buffer.stream.shards import RawEntry

EVERYTHING = 1 << 20  # an epoch after all others
AT_MS = 1_732_368_000_123


def header(item_id: str, *, cut: int | None = None, user: str | None = None, more: bool = False) -> bytes:
    return encode_header("acme/c7", item_id, user, AT_MS, cut, more)


def arguments(sequence: int, count: int = 1) -> list[bytes]:
    """What an append of ``count`` items sends: four an item."""
    found: list[bytes] = []
    for index in range(sequence, sequence + count):
        found += (b"id digest", b"body", header(f"m-{index}"), b'{"n":%d}' % index)
    return found


def entry(epoch: int, sequence: int) -> RawEntry:
    """The same item as it stands in the stream."""
    return b"%d-%d" % (epoch, sequence), header(f"m-{sequence}") + b"41", b'{"n":%d}' % sequence


def keep(retention: Retention, epoch: int, sequence: int, count: int = 1, shard: int = 0) -> None:
    given = arguments(sequence, count)
    retention.keep(shard, epoch, sequence, count, given, sum(map(len, given[3::4])))


def kept(retention: Retention, shard: int = 0) -> list[tuple[int, int]]:
    """(epoch, sequence) of every retained item."""
    rows = retention.older(shard, EVERYTHING)
    return [(epoch_of(row.position), sequence_of(row.position)) for row in rows]


def account(retention: Retention) -> tuple[int, int, list[int]]:
    return retention.turns, retention.bytes, retention.shards()


@pytest.fixture
def retention() -> Retention:
    return Retention(2)


# --- release


def test_a_mark_releases_what_it_covers_and_nothing_after_it(retention: Retention) -> None:
    """To the very number."""
    for sequence in range(5):
        keep(retention, 3, sequence)
    retention.release(0, 3, 2)
    assert kept(retention) == [(3, 3), (3, 4)]
    retention.release(0, 3, 4)
    assert account(retention) == (0, 0, [])


@pytest.mark.parametrize("epoch", [2, 4])
def test_a_mark_of_another_epoch_releases_nothing(retention: Retention, epoch: int) -> None:
    """Numbers begin anew with every epoch: what the other one flushed says nothing of ours."""
    keep(retention, 3, 0)
    retention.release(0, epoch, 1_000)
    assert kept(retention) == [(3, 0)]


def test_a_mark_of_another_shard_releases_nothing(retention: Retention) -> None:
    """Shards count their own numbers."""
    keep(retention, 3, 0)
    retention.release(1, 3, 1_000)
    assert account(retention)[::2] == (1, [0])


def test_a_batch_stays_whole_until_its_last_item_is_flushed(retention: Retention) -> None:
    """A mark in its middle releases none of it."""
    keep(retention, 3, 10, count=4)
    retention.release(0, 3, 12)
    assert kept(retention) == [(3, n) for n in range(10, 14)]
    retention.release(0, 3, 13)
    assert account(retention) == (0, 0, [])


def test_an_older_mark_that_comes_late_changes_nothing(retention: Retention) -> None:
    """Marks are told more than once, in any order."""
    for sequence in range(3):
        keep(retention, 3, sequence)
    retention.release(0, 3, 1)
    retention.release(0, 3, 0)
    retention.release(0, 3, -1)
    assert kept(retention) == [(3, 2)]


def test_a_repeat_of_what_is_flushed_is_let_go_of_by_the_mark_that_is_known(retention: Retention) -> None:
    """No newer mark may ever come: the shard can be idle from then on."""
    retention.release(0, 3, 7)
    keep(retention, 3, 5)
    retention.release(0, 3, 7)
    assert account(retention) == (0, 0, [])


def test_a_repeat_of_an_older_item_waits_at_most_for_what_stands_before_it(retention: Retention) -> None:
    """It was acked after a newer one: the mark that passes both releases both."""
    keep(retention, 3, 9)
    keep(retention, 3, 4)
    retention.release(0, 3, 9)
    assert account(retention) == (0, 0, [])


# --- the account


def test_an_item_that_is_kept_twice_counts_once(retention: Retention) -> None:
    """Acked and repeated, acked and shown to a reader, in either order."""
    keep(retention, 3, 0)
    once = account(retention)
    keep(retention, 3, 0)
    retention.keep_entries(0, 3, [entry(3, 0)])
    assert account(retention) == once
    assert once == (1, len(b'{"n":0}') + OVERHEAD_BYTES, [0])


def test_entries_shown_to_a_reader_are_kept_like_acked_ones(retention: Retention) -> None:
    """With the body and the header that stand in the stream."""
    retention.keep_entries(0, 3, [entry(3, 5), entry(3, 6)])
    keep(retention, 3, 7)
    assert [(row.item_id, row.data) for row in retention.older(0, 4)] == [
        ("m-5", b'{"n":5}'),
        ("m-6", b'{"n":6}'),
        ("m-7", b'{"n":7}'),
    ]
    retention.release(0, 3, 7)
    assert account(retention) == (0, 0, [])


def test_a_batch_of_which_a_part_was_shown_is_spilled_with_the_same_positions(retention: Retention) -> None:
    """Its items may be listed twice, never at two places."""
    retention.keep_entries(0, 3, [entry(3, 11)])
    keep(retention, 3, 10, count=3)
    assert set(kept(retention)) == {(3, 10), (3, 11), (3, 12)}
    retention.release(0, 3, 12)
    assert account(retention) == (0, 0, [])


# --- spilling


def test_older_gives_what_is_retained_of_earlier_epochs_in_order(retention: Retention) -> None:
    """Of the shard that is asked for; nothing of the epoch itself."""
    keep(retention, 5, 0)
    keep(retention, 3, 8)
    keep(retention, 3, 2, count=2)
    keep(retention, 4, 1)
    keep(retention, 3, 0, shard=1)
    positions = [row.position for row in retention.older(0, 5)]
    assert positions == [pack(3, 2), pack(3, 3), pack(3, 8), pack(4, 1)]
    assert retention.older(0, 3) == []


def test_older_gives_rows_as_they_were_accepted(retention: Retention) -> None:
    """Ids, user, time, body, and what the item replaces."""
    retention.keep(0, 3, 7, 1, [b"", b"", header("m-1", cut=41, user="u42"), b"{}"], 2)
    at = datetime(2024, 11, 23, 13, 20, tzinfo=UTC) + timedelta(milliseconds=123)
    assert retention.older(0, 4) == [Placed("acme", "c7", pack(3, 7), "m-1", at, b"{}", cut=41, user="u42")]


def test_older_forgets_nothing(retention: Retention) -> None:
    """Its transaction may fail, or its answer be lost: then the same is spilled again."""
    keep(retention, 3, 0)
    assert retention.older(0, 4) == retention.older(0, 4) != []


def test_drop_older_forgets_earlier_epochs_of_that_shard_only(retention: Retention) -> None:
    """Postgres has them; what is newer, and other shards, stay."""
    for epoch in (2, 3, 4):
        keep(retention, epoch, 0)
    keep(retention, 2, 0, shard=1)
    retention.drop_older(0, 4)
    assert kept(retention) == [(4, 0)]
    assert kept(retention, 1) == [(2, 0)]
    retention.release(0, 4, 0)
    retention.drop_older(1, 9)
    assert account(retention) == (0, 0, [])


# --- any order of all of it


class RetentionMachine(RuleBasedStateMachine):
    """Whatever is kept, shown, flushed and dropped: compare with plain sets."""

    def __init__(self) -> None:
        super().__init__()
        self.retention = Retention(1)
        self.epoch = 1
        self.flushed = dict.fromkeys(range(1, 100), -1)
        self.next = 0
        self.given: set[tuple[int, int]] = set()  # acked or shown, not dropped
        self.batches: dict[int, int] = {}  # of this epoch: first number to how many

    def _keep(self, sequence: int, count: int) -> None:
        keep(self.retention, self.epoch, sequence, count)
        self.given |= {(self.epoch, n) for n in range(sequence, sequence + count)}

    @rule(count=st.integers(1, 4), gap=st.integers(0, 3))
    def ack(self, count: int, gap: int) -> None:
        """An append of this process, after some of others."""
        self.next += gap
        self.batches[self.next] = count
        self._keep(self.next, count)
        self.next += count

    @rule(data=st.data())
    @precondition(lambda self: self.next)
    def show(self, data: st.DataObject) -> None:
        """A reader was shown a part of the tail."""
        first = data.draw(st.integers(0, self.next - 1))
        last = data.draw(st.integers(first, self.next - 1))
        shown: Sequence[int] = range(max(first, self.flushed[self.epoch] + 1), last + 1)
        self.retention.keep_entries(0, self.epoch, [entry(self.epoch, n) for n in shown])
        self.given |= {(self.epoch, n) for n in shown}

    @rule(data=st.data())
    @precondition(lambda self: self.batches)
    def repeat(self, data: st.DataObject) -> None:
        """An append is repeated, flushed or not."""
        self._keep(data.draw(st.sampled_from(sorted(self.batches))), 1)

    @rule(data=st.data())
    def flush(self, data: st.DataObject) -> None:
        """A mark, of this epoch or an older one, newer or not."""
        epoch = data.draw(st.integers(1, self.epoch))
        through = data.draw(st.integers(-1, self.next + 5))
        self.flushed[epoch] = max(self.flushed[epoch], through)
        self.retention.release(0, epoch, through)

    @rule()
    def switch(self) -> None:
        """A new epoch; sometimes the one before is still to be spilled."""
        self.epoch, self.next = self.epoch + 1, 0
        self.batches.clear()

    @rule()
    def spill(self) -> None:
        """What is older is in Postgres."""
        assert {position for position in self.given if not self._covered(position)} <= set(
            kept(self.retention)
        )
        self.retention.drop_older(0, self.epoch)
        self.given = {position for position in self.given if position[0] >= self.epoch}

    def _covered(self, position: tuple[int, int]) -> bool:
        return position[1] <= self.flushed[position[0]]

    @invariant()
    def holds_all_that_no_mark_covers(self) -> None:
        """And nothing that was never given to it."""
        held = set(kept(self.retention))
        assert {position for position in self.given if not self._covered(position)} <= held <= self.given

    @invariant()
    def account_is_what_is_held(self) -> None:
        """Turns and bytes, item by item."""
        rows = self.retention.older(0, EVERYTHING)
        assert self.retention.turns == len(rows)
        assert self.retention.bytes == sum(len(row.data) + OVERHEAD_BYTES for row in rows)

    def teardown(self) -> None:
        """When all is flushed or dropped nothing is left."""
        self.retention.release(0, self.epoch, 1_000_000)
        self.retention.drop_older(0, self.epoch)
        assert account(self.retention) == (0, 0, [])


TestRetentionMachine = RetentionMachine.TestCase
