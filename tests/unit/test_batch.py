"""A flush's batch: the rows that Postgres gets, how far each shard moves, and what Redis may forget."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from buffer.flush import batch as batch_module
from buffer.flush.batch import SETTLE_STEP, Batch, RawEntry, ShardBatch, decode
from buffer.model.position import MAX_EPOCH, MAX_SEQUENCE, pack
from buffer.model.record import UnknownRecordFormat, encode_header
from buffer.store.shards import Owned

# Tenant and conversation, with names that would meet if they were joined carelessly. One shard each.
CONVERSATIONS = {0: [("a", "bc"), ("ab", "c"), ("a", "b")], 1: [("b", "a"), ("a", "租户")]}


@dataclass
class Step:
    """One entry as a test draws it; ``cut`` is a sequence after which it removes."""

    shard: int
    conversation: tuple[str, str]
    cut: int | None


@st.composite
def streams(draw: st.DrawFn, *, min_size: int = 0) -> list[Step]:
    """Entries of two shards in the order in which they were appended; some replace older ones."""
    steps: list[Step] = []
    counts = [0, 0]
    for _ in range(draw(st.integers(min_size, 14))):
        shard = draw(st.integers(0, 1))
        conversation = draw(st.sampled_from(CONVERSATIONS[shard]))
        cut = draw(st.none() | st.integers(-1, counts[shard] - 1))
        steps.append(Step(shard, conversation, cut))
        counts[shard] += 1
    return steps


owners = st.builds(
    Owned,
    shard=st.just(0),
    fence=st.integers(1, 99),
    path_epoch=st.integers(1, MAX_EPOCH),
    flushed_through=st.just(0),
)


def entries_of(steps: list[Step], shard: int, epoch: int, first: int) -> list[RawEntry]:
    """The shard's entries as Redis gives them, numbered from ``first``."""
    mine = [step for step in steps if step.shard == shard]
    return [
        (
            b"%d-%d" % (epoch, first + number),
            encode_header(
                "/".join(step.conversation),
                f"item-{number}",
                f"user-{number}" if number % 2 else None,
                1_732_368_000_000 + number,
                None if step.cut is None else pack(epoch, first + step.cut),
                batch_continues=False,
            )
            + b"41",
            b'{"n":%d}' % number,
        )
        for number, step in enumerate(mine)
    ]


def part_of(entries: list[RawEntry], owned: Owned, committed: int | None = None) -> ShardBatch:
    records, sizes = decode(entries)
    before = records[0].sequence - 1
    return ShardBatch(owned, before, before if committed is None else committed, records, sizes)


def owned_shards(draw: st.DataObject) -> list[Owned]:
    return [draw.draw(owners)._replace(shard=shard) for shard in (0, 1)]


@given(streams(), st.data(), st.integers(0, MAX_SEQUENCE - 20))
def test_rows_are_the_entries_that_postgres_does_not_have(
    steps: list[Step], data: st.DataObject, first: int
) -> None:
    """One row for each fresh entry, in order, with its own position, ids, time and payload."""
    owned = owned_shards(data)
    parts, expected = [], []
    for shard in (0, 1):
        entries = entries_of(
            [Step(s.shard, s.conversation, None) for s in steps], shard, owned[shard].path_epoch, first
        )
        if not entries:
            continue
        done = data.draw(st.integers(0, len(entries)))
        parts.append(part_of(entries, owned[shard], first + done - 1))
        records, _ = decode(entries)
        expected += [
            (
                record.tenant,
                record.conversation,
                pack(owned[shard].path_epoch, first + number),
                f"item-{number}",
                record.created_at,
                f'{{"n":{number}}}',
            )
            for number, record in enumerate(records)
            if number >= done
        ]
    batch = Batch(parts, full=False, fetched_at=0.0)
    rows, cuts = batch.rows()
    assert rows == expected
    assert cuts == []
    assert batch.fresh == len(rows)


def replayed(steps: list[Step]) -> dict[tuple[int, tuple[str, str]], list[int]]:
    """The model: each conversation as a list of its items' numbers, appended and cut one by one."""
    conversations: dict[tuple[int, tuple[str, str]], list[int]] = {}
    counts = [0, 0]
    for step in steps:
        items = conversations.setdefault((step.shard, step.conversation), [])
        if step.cut is not None:
            items[:] = [number for number in items if number <= step.cut]
        items.append(counts[step.shard])
        counts[step.shard] += 1
    return conversations


@given(streams(), st.data())
def test_flushing_in_any_batches_leaves_what_one_append_after_the_other_would(
    steps: list[Step], data: st.DataObject
) -> None:
    """Cuts within a batch, across batches and between conversations: rows and cuts give the same items."""
    owned = owned_shards(data)
    rows: dict[tuple[str, str, int], Any] = {}
    entries = [entries_of(steps, shard, owned[shard].path_epoch, 5) for shard in (0, 1)]
    while any(entries):
        parts = []
        for shard in (0, 1):
            size = data.draw(st.integers(0, len(entries[shard])))
            taken, entries[shard] = entries[shard][:size], entries[shard][size:]
            if taken:
                parts.append(part_of(taken, owned[shard]))
        new, cuts = Batch(parts, full=True, fetched_at=0.0).rows()
        rows |= {row[:3]: row.data for row in new}
        for cut in cuts:
            for key in rows:
                if key[:2] == cut[:2] and cut.after < key[2] < cut.before:
                    rows[key] = None
    for (shard, conversation), numbers in replayed(steps).items():
        left = sorted(key[2] for key, item in rows.items() if key[:2] == conversation and item is not None)
        assert left == [pack(owned[shard].path_epoch, 5 + number) for number in numbers]
    assert len(rows) == len(steps)  # a removed item keeps its row, and with it its id


@given(streams(), st.data())
def test_a_row_removed_within_its_batch_never_carries_its_data(
    steps: list[Step], data: st.DataObject
) -> None:
    """What was replaced before it was flushed is not written to Postgres, not even for a moment."""
    owned = owned_shards(data)
    parts = [
        part_of(entries, owned[shard])
        for shard in (0, 1)
        if (entries := entries_of(steps, shard, owned[shard].path_epoch, 0))
    ]
    rows, cuts = Batch(parts, full=False, fetched_at=0.0).rows()
    alive = {
        (*conversation, pack(owned[shard].path_epoch, number))
        for (shard, conversation), numbers in replayed(steps).items()
        for number in numbers
    }
    assert {row[:3] for row in rows if row.data is not None} == alive
    assert [cut.before for cut in cuts] == [
        row.position
        for row, step in zip(rows, sorted(steps, key=lambda step: step.shard), strict=True)
        if step.cut is not None
    ]


@given(streams(min_size=1), st.data(), st.integers(0, MAX_SEQUENCE - 20), st.integers(1, 6))
def test_settlements_cover_every_entry_exactly_once(
    steps: list[Step], data: st.DataObject, first: int, step_size: int
) -> None:
    """The steps join without gap or overlap, with the bytes and conversations of exactly their entries."""
    owned = owned_shards(data)
    shard = steps[0].shard
    entries = entries_of(steps, shard, owned[shard].path_epoch, first)
    part = part_of(entries, owned[shard], first + data.draw(st.integers(-1, len(entries) - 1)))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(batch_module, "SETTLE_STEP", step_size)
        settlements = part.settlements()
    assert [s.before for s in settlements] == [first - 1, *(s.after for s in settlements[:-1])]
    assert settlements[-1].after == part.through == first + len(entries) - 1
    for settlement in settlements:
        assert 1 <= settlement.after - settlement.before <= step_size
        covered = entries[settlement.before + 1 - first : settlement.after + 1 - first]
        assert settlement.bytes == sum(len(header) + len(payload) for _, header, payload in covered)
        keys = [b"/".join(header.split(b"/")[2:4]).decode() for _, header, _ in covered]
        assert sorted(settlement.conversations) == sorted(set(keys))


def test_a_settle_step_is_short_and_a_large_batch_takes_several() -> None:
    """Redis does nothing else during a step: 1,201 entries of 1,201 conversations take three."""
    steps = [Step(0, ("t", f"c{number}"), None) for number in range(2 * SETTLE_STEP + 201)]
    part = part_of(entries_of(steps, 0, 1, 0), Owned(0, 1, 1, 0))
    assert [(s.before, s.after, len(s.conversations)) for s in part.settlements()] == [
        (-1, 499, 500),
        (499, 999, 500),
        (999, 1200, 201),
    ]


@given(streams(), st.data(), st.integers(0, MAX_SEQUENCE - 20))
def test_a_shard_advances_by_what_is_fresh_and_to_its_last_entry(
    steps: list[Step], data: st.DataObject, first: int
) -> None:
    """Turns counted once: a part that was committed before moves nothing, a half one by its other half."""
    owned = owned_shards(data)
    parts, expected = [], []
    for shard in (0, 1):
        entries = entries_of(steps, shard, owned[shard].path_epoch, first)
        if not entries:
            continue
        done = data.draw(st.integers(0, len(entries)))
        parts.append(part_of(entries, owned[shard], first + done - 1))
        if done < len(entries):
            through = pack(owned[shard].path_epoch, first + len(entries) - 1)
            expected.append(
                (shard, owned[shard].fence, owned[shard].path_epoch, through, len(entries) - done)
            )
    batch = Batch(parts, full=False, fetched_at=0.0)
    assert batch.advances() == expected
    assert batch.fresh == sum(turns for *_, turns in expected)


@given(streams(), st.data())
def test_a_batch_without_a_shard_is_the_rest_of_it(steps: list[Step], data: st.DataObject) -> None:
    """Rows, moves and the count of the other shards, and nothing of the one that was left out."""
    owned = owned_shards(data)
    parts = [
        part_of(entries, owned[shard])
        for shard in (0, 1)
        if (entries := entries_of(steps, shard, owned[shard].path_epoch, 0))
    ]
    whole = Batch(parts, full=True, fetched_at=7.0)
    for gone in (0, 1):
        rest = whole.without([gone])
        assert (rest.full, rest.fetched_at) == (True, 7.0)
        assert [part.owned.shard for part in rest.parts] == [
            p.owned.shard for p in parts if p.owned.shard != gone
        ]
        assert (
            rest.rows()
            == Batch([p for p in parts if p.owned.shard != gone], full=True, fetched_at=7.0).rows()
        )
        assert rest.fresh == sum(step.shard != gone for step in steps)
    assert whole.without([0, 1]).parts == []
    assert whole.fresh == len(steps)


def test_an_empty_batch_writes_and_moves_nothing() -> None:
    """No parts: no rows, no cuts, no moves."""
    batch = Batch([], full=False, fetched_at=0.0)
    assert (batch.fresh, batch.rows(), batch.advances()) == (0, ([], []), [])


def test_a_batch_with_an_unknown_record_is_refused_whole() -> None:
    """Nothing after a record of a newer release may overtake it."""
    entries = entries_of([Step(0, ("a", "b"), None)] * 3, 0, 1, 0)
    newer = (b"1-1", entries[1][1].replace(b"1/", b"2/", 1), b"{}")
    with pytest.raises(UnknownRecordFormat, match="record 1-1"):
        decode([entries[0], newer, entries[2]])


def test_sizes_are_counted_as_the_append_script_counts_them() -> None:
    """Header and payload in bytes: what is added at the append is what is taken away at the settlement."""
    entries = entries_of([Step(1, ("a", "租户"), None)], 1, 1, 0)
    (_, header, payload) = entries[0]
    assert decode(entries)[1] == [len(header) + len(payload)]
    assert len(header) > len(header.decode())
