"""A flush's batch: the rows that Postgres gets, how far each shard moves, and what Redis may forget."""

from __future__ import annotations

import struct
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from buffer.flush import batch as batch_module
from buffer.flush.batch import SETTLE_STEP, Batch, ShardBatch, Written, decode
from buffer.model.position import MAX_EPOCH, MAX_SEQUENCE, pack
from buffer.model.record import DELETE, ERASE, ITEM, UnknownRecordFormat, encode_header, removal
from buffer.store.items import Row
from buffer.store.shards import Owned
from buffer.stream.shards import RawEntry

from .strategies import ids

ACCEPTED = datetime(2024, 11, 23, 13, 20, tzinfo=UTC)  # the first entry's time; one millisecond more for each

# Tenant and conversation, with names that would meet if they were joined carelessly. One shard each.
CONVERSATIONS = {0: [("a", "bc"), ("ab", "c"), ("a", "b")], 1: [("b", "a"), ("a", "租户")]}


@dataclass
class Step:
    """One entry as a test draws it; ``cut`` is the sequence that its removal names."""

    shard: int
    conversation: tuple[str, str]
    cut: int | None
    kind: str = ITEM


@st.composite
def streams(draw: st.DrawFn, *, min_size: int = 0) -> list[Step]:
    """Entries of two shards in the order in which they were appended; some remove older ones."""
    steps: list[Step] = []
    counts = [0, 0]
    for _ in range(draw(st.integers(min_size, 14))):
        shard = draw(st.integers(0, 1))
        conversation = draw(st.sampled_from(CONVERSATIONS[shard]))
        kind = draw(st.sampled_from([ITEM] * 4 + [DELETE, ERASE])) if counts[shard] else ITEM
        cut = draw(st.none() | st.integers(-1, counts[shard] - 1)) if kind == ITEM else None
        if kind == DELETE:
            cut = draw(st.integers(0, counts[shard] - 1))
        steps.append(Step(shard, conversation, cut, kind))
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
                False,
                step.kind,
            )
            + b"41",
            b'{"n":%d}' % number if step.kind == ITEM else b"",
        )
        for number, step in enumerate(mine)
    ]


def part_of(entries: list[RawEntry], owned: Owned, committed: int | None = None) -> ShardBatch:
    decoded, unknown = decode(entries)
    assert unknown is None
    before = decoded[0].sequence - 1
    return ShardBatch(owned, before, before if committed is None else committed, decoded)


def owned_shards(data: st.DataObject) -> list[Owned]:
    return [data.draw(owners)._replace(shard=shard) for shard in (0, 1)]


def batch_of(steps: list[Step], owned: list[Owned], first: int = 0) -> Batch:
    """All entries of both shards in one batch, none of them committed before."""
    entries = [entries_of(steps, shard, owned[shard].path_epoch, first) for shard in (0, 1)]
    parts = [part_of(entries[shard], owned[shard]) for shard in (0, 1) if entries[shard]]
    return Batch(parts, full=False, fetched_at=0.0)


def parsed(row: bytes) -> Row:
    """A row in COPY's binary format, read as its documentation says: a count, then length and bytes."""
    (count,) = struct.unpack_from(">h", row)
    fields: list[bytes | None] = []
    at = 2
    for _ in range(count):
        (length,) = struct.unpack_from(">i", row, at)
        at += 4
        fields.append(None if length == -1 else row[at : at + length])
        at += max(0, length)
    assert at == len(row)
    tenant, conversation, position, item_id, created, data = fields
    microseconds = timedelta(microseconds=int.from_bytes(created, "big", signed=True))
    return Row(
        tenant.decode(),
        conversation.decode(),
        int.from_bytes(position, "big", signed=True),
        item_id.decode(),
        datetime(2000, 1, 1, tzinfo=UTC) + microseconds,
        None if data is None else data.decode(),
    )


def rows_of(batch: Batch) -> list[Row]:
    """What the batch writes."""
    return [parsed(row) for row in batch.encoded_rows()]


# --- rows


@given(streams(), st.data(), st.integers(0, MAX_SEQUENCE - 20))
def test_rows_are_the_entries_that_postgres_does_not_have(
    steps: list[Step], data: st.DataObject, first: int
) -> None:
    """One row for each fresh entry, in order, with its own position, ids, time and payload."""
    owned = owned_shards(data)
    whole = [Step(step.shard, step.conversation, None) for step in steps]
    parts, expected = [], []
    for shard in (0, 1):
        mine = [step for step in whole if step.shard == shard]
        if not mine:
            continue
        done = data.draw(st.integers(0, len(mine)))
        entries = entries_of(whole, shard, owned[shard].path_epoch, first)
        parts.append(part_of(entries, owned[shard], first + done - 1))
        expected += [
            Row(
                *step.conversation,
                pack(owned[shard].path_epoch, first + number),
                f"item-{number}",
                ACCEPTED + timedelta(milliseconds=number),
                f'{{"n":{number}}}',
            )
            for number, step in enumerate(mine)
            if number >= done
        ]
    batch = Batch(parts, full=False, fetched_at=0.0)
    assert rows_of(batch) == expected
    assert batch.cuts() == []
    assert batch.fresh == len(expected)


@given(ids, ids, ids, st.none() | ids, st.integers(0, 7_258_118_400_000), st.binary(max_size=20))
@example("😀" * 200, "租" * 200, "\U0010ffff" * 200, None, 1_732_368_000_123, b"")
def test_any_allowed_ids_reach_postgres_unchanged(
    tenant: str, conversation: str, item_id: str, user: str | None, created_ms: int, data: bytes
) -> None:
    """200 characters of any script in each id, any time until the year 2200, and the payload's own bytes."""
    header = encode_header(f"{tenant}/{conversation}", item_id, user, created_ms, None, False)
    payload = b'{"a":"%s"}' % data.hex().encode()
    batch = Batch([part_of([(b"3-9", header, payload)], Owned(0, 1, 3, 0))], full=False, fetched_at=0.0)
    created_at = datetime(1970, 1, 1, tzinfo=UTC) + timedelta(milliseconds=created_ms)
    expected = Row(tenant, conversation, pack(3, 9), item_id, created_at, payload.decode())
    assert rows_of(batch) == [expected]


# --- removals


def replayed(steps: list[Step]) -> dict[tuple[int, tuple[str, str]], list[int]]:
    """The model: each conversation as a list of its items' numbers, appended and cut one by one."""
    conversations: dict[tuple[int, tuple[str, str]], list[int]] = {}
    counts = [0, 0]
    for step in steps:
        items = conversations.setdefault((step.shard, step.conversation), [])
        if removed := removal(step.kind, step.cut, counts[step.shard]):
            items[:] = [number for number in items if not removed.covers(number)]
        if step.kind == ITEM:
            items.append(counts[step.shard])
        counts[step.shard] += 1
    return conversations


def erased_later(steps: list[Step], step: Step) -> bool:
    """Whether a later entry erases this one."""
    later = steps[next(i for i, s in enumerate(steps) if s is step) :]
    return any(s.kind == ERASE and s.conversation == step.conversation for s in later)


@given(streams(), st.data())
def test_flushing_in_any_batches_leaves_what_one_append_after_the_other_would(
    steps: list[Step], data: st.DataObject
) -> None:
    """Cuts within a batch, across batches and between conversations: rows and cuts give the same items."""
    owned = owned_shards(data)
    table: dict[tuple[str, str, int], Any] = {}
    entries = [entries_of(steps, shard, owned[shard].path_epoch, 5) for shard in (0, 1)]
    sizes = st.integers(1, 6)
    while any(entries):
        parts = []
        for shard in (0, 1):
            size = data.draw(sizes)
            taken, entries[shard] = entries[shard][:size], entries[shard][size:]
            if taken:
                parts.append(part_of(taken, owned[shard]))
        batch = Batch(parts, full=True, fetched_at=0.0)
        for erasure in batch.erasures():
            erased = [k for k in table if k[:2] == erasure[:2] and k[2] <= erasure.through]
            for key in erased:
                del table[key]
        table |= {row[:3]: row.data for row in rows_of(batch)}
        for cut in batch.cuts():
            for key in table:
                if key[:2] == cut[:2] and cut.after < key[2] < cut.before:
                    table[key] = None
    for (shard, conversation), numbers in replayed(steps).items():
        left = sorted(key[2] for key, item in table.items() if key[:2] == conversation and item is not None)
        assert left == [pack(owned[shard].path_epoch, 5 + number) for number in numbers]
    kept = [step for step in steps if step.kind == ITEM and not erased_later(steps, step)]
    assert len(table) == len(kept)  # a removed item keeps its row, and with it its id


@given(streams(), st.data())
def test_a_row_removed_within_its_batch_never_carries_its_data(
    steps: list[Step], data: st.DataObject
) -> None:
    """What was replaced before it was flushed is not written to Postgres, not even for a moment."""
    owned = owned_shards(data)
    batch = batch_of(steps, owned)
    alive = {
        (*conversation, pack(owned[shard].path_epoch, number))
        for (shard, conversation), numbers in replayed(steps).items()
        for number in numbers
    }
    rows = rows_of(batch)
    assert {row[:3] for row in rows if row.data is not None} == alive
    counts = [0, 0]
    expected = set()
    for step in steps:
        epoch, number = owned[step.shard].path_epoch, counts[step.shard]
        counts[step.shard] += 1
        if step.kind != ERASE and step.cut is not None and not erased_later(steps, step):
            position, cut = pack(epoch, number), pack(epoch, step.cut)
            after, before = (cut, position) if step.kind == ITEM else (cut - 1, cut + 1)
            deleted = None if step.kind == ITEM else f"item-{number}"
            expected.add((*step.conversation, position, after, before, deleted))
    assert set(batch.cuts()) == expected
    assert len(batch.cuts()) == len(expected)


def test_a_cut_that_was_committed_before_is_not_made_again() -> None:
    """A batch that begins with committed entries writes neither their rows nor their cuts."""
    steps = [Step(0, ("a", "b"), None), Step(0, ("a", "b"), 0), Step(0, ("a", "b"), None)]
    part = part_of(entries_of(steps, 0, 1, 0), Owned(0, 1, 1, 0), committed=1)
    batch = Batch([part], full=False, fetched_at=0.0)
    assert batch.cuts() == []
    assert [row.item_id for row in rows_of(batch)] == ["item-2"]


# --- settlements


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
        settlements = part.settlements(Written(set(), set()))
    assert [s.before for s in settlements] == [first - 1, *(s.after for s in settlements[:-1])]
    assert settlements[-1].after == part.through == first + len(entries) - 1
    for settlement in settlements:
        assert 1 <= settlement.after - settlement.before <= step_size
        covered = entries[settlement.before + 1 - first : settlement.after + 1 - first]
        assert settlement.nbytes == sum(len(header) + len(payload) for _, header, payload in covered)
        keys = [b"/".join(header.split(b"/")[2:4]) for _, header, _ in covered]
        assert sorted(settlement.conversations) == sorted(set(keys))


def test_a_settle_step_is_short_and_a_large_batch_takes_several() -> None:
    """Redis does nothing else during a step: 701 entries of 701 conversations take three."""
    steps = [Step(0, ("t", f"c{number}"), None) for number in range(2 * SETTLE_STEP + 201)]
    part = part_of(entries_of(steps, 0, 1, 0), Owned(0, 1, 1, 0))
    assert [(s.before, s.after, len(s.conversations)) for s in part.settlements(Written(set(), set()))] == [
        (-1, 249, 250),
        (249, 499, 250),
        (499, 700, 201),
    ]


def test_a_view_is_begun_once_appended_to_after_that_and_dropped_where_it_could_be_wrong() -> None:
    """By what the commit showed; removals, misfits and what somebody else committed drop the whole view."""
    names = {"new": ("t", "new"), "old": ("t", "old"), "cut": ("t", "cut"), "bad": ("t", "bad")}
    steps = [Step(0, names[n], None) for n in ("cut", "old", "new", "bad")]
    steps += [Step(0, names["cut"], 0), Step(0, names["new"], None), Step(0, ("t", "other"), None)]
    part = part_of(entries_of(steps, 0, 1, 0), Owned(0, 1, 1, 0))
    written = Written(begun={b"t/new", b"t/bad"}, misfits={b"t/bad"})
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(batch_module, "SETTLE_STEP", 5)
        found = [dict(zip(s.conversations, s.views.decode(), strict=True)) for s in part.settlements(written)]
    assert found == [
        {b"t/cut": "x", b"t/old": "a", b"t/new": "n", b"t/bad": "x"},
        {b"t/new": "a", b"t/other": "a"},
    ]
    half = part_of(entries_of(steps, 0, 1, 0), Owned(0, 1, 1, 0), committed=1)
    (step,) = half.settlements(Written(set(), set()))
    assert dict(zip(step.conversations, step.views.decode(), strict=True)) == {
        b"t/cut": "x",
        b"t/old": "x",
        b"t/new": "a",
        b"t/bad": "a",
        b"t/other": "a",
    }


# --- advances


@given(streams(), st.data(), st.integers(0, MAX_SEQUENCE - 20))
def test_a_shard_advances_by_what_is_fresh_and_to_its_last_entry(
    steps: list[Step], data: st.DataObject, first: int
) -> None:
    """Turns counted once: a part that was committed before moves nothing, a half one by its other half."""
    owned = owned_shards(data)
    parts, expected = [], []
    for shard in (0, 1):
        epoch = owned[shard].path_epoch
        entries = entries_of(steps, shard, epoch, first)
        if not entries:
            continue
        done = data.draw(st.integers(0, len(entries)))
        parts.append(part_of(entries, owned[shard], first + done - 1))
        if done < len(entries):
            through = pack(epoch, first + len(entries) - 1)
            expected.append((shard, owned[shard].fence, epoch, through, len(entries) - done))
    batch = Batch(parts, full=False, fetched_at=0.0)
    assert batch.advances() == expected
    assert batch.fresh == sum(turns for *_, turns in expected)


def test_an_empty_batch_writes_and_moves_nothing() -> None:
    """No parts: no rows, no cuts, no moves."""
    batch = Batch([], full=False, fetched_at=0.0)
    assert (batch.fresh, rows_of(batch)) == (0, [])
    assert (batch.cuts(), batch.advances()) == ([], [])


# --- records of a newer release


@pytest.mark.parametrize("newer", [b"2/i/a/b/item-1//5///", b'{"v":2}', b"1/x/a/b/item-1//5///", b""])
def test_a_batch_ends_before_an_unknown_record(newer: bytes) -> None:
    """What came before a record of a newer release is flushed; nothing that came after may overtake it."""
    entries = entries_of([Step(0, ("a", "b"), None)] * 3, 0, 1, 0)
    decoded, unknown = decode([entries[0], (b"1-1", newer, b"{}"), entries[2]])
    assert [entry.raw for entry in decoded] == [entries[0]]
    assert isinstance(unknown, UnknownRecordFormat)
    assert "record 1-1" in str(unknown)
