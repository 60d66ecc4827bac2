"""Entries that cannot be stored as they are: repeats of a stored id, and rows that Postgres refuses.

They are looked for only after a COPY has failed, since a COPY is all or nothing. A repeat that is equal to
what is stored is left out; whatever else is left out becomes a dead letter, with its payload and the
reason, in the transaction that stores its neighbours.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from buffer.flush.batch import Batch, Entry, ShardBatch
from buffer.model.codec import equal_as_json
from buffer.model.position import pack
from buffer.model.record import decode_entry
from buffer.store import items
from buffer.store.dead_letters import DeadLetter
from buffer.store.items import Identity
from buffer.store.pool import Connection


@dataclass(slots=True)
class Misfits:
    """What was found. ``left_out``: shard to sequences."""

    left_out: dict[int, set[int]] = field(default_factory=dict)
    letters: list[DeadLetter] = field(default_factory=list)
    equal_repeats: int = 0

    def leave_out(self, part: ShardBatch, entry: Entry) -> None:
        """This entry is not written as a row."""
        self.left_out.setdefault(part.owned.shard, set()).add(entry.sequence)

    def conversations(self, batch: Batch) -> set[bytes]:
        """The conversations that they belong to."""
        return {
            entry.conversation_key
            for part in batch.parts
            if (sequences := self.left_out.get(part.owned.shard))
            for entry in part.entries
            if entry.sequence in sequences
        }

    def fitting(self, batch: Batch) -> Batch:
        """The batch without them; they still count as flushed."""
        return batch.without({shard: frozenset(found) for shard, found in self.left_out.items()})


async def find_misfits(connection: Connection, batch: Batch, timeout_seconds: float) -> Misfits:
    """Look every fresh entry up, and try every row; nothing is written."""
    misfits = Misfits()
    await _find_repeats(connection, batch, misfits)
    await _find_bad_rows(connection, misfits.fitting(batch), misfits, timeout_seconds)
    return misfits


async def _find_repeats(connection: Connection, batch: Batch, misfits: Misfits) -> None:
    fresh = [(part, entry, decode_entry(*entry.raw)) for part in batch.parts for entry in part.new()]
    stored: dict[Identity, tuple[int, str | bytes | None]] = {
        **await items.present(connection, [record.identity for *_, record in fresh])
    }
    for part, entry, record in fresh:
        position = pack(part.owned.path_epoch, entry.sequence)
        if record.identity not in stored:  # the next entry of this id, if there is one, is a repeat
            stored[record.identity] = (position, record.data)
            continue
        misfits.leave_out(part, entry)
        first, data = stored[record.identity]
        if first == position:
            continue
        if data is not None and equal_as_json(record.data, data):
            misfits.equal_repeats += 1
            continue
        why = "belongs to a removed item" if data is None else "is stored with another body"
        reason = f"the id {why}, at position {first}"
        misfits.letters.append(DeadLetter(*record.identity, position, record.data, reason))


async def _find_bad_rows(
    connection: Connection, batch: Batch, misfits: Misfits, timeout_seconds: float
) -> None:
    entries = [(part, entry) for part in batch.parts for entry in part.new()]
    bad = await items.find_bad_rows(connection, list(batch.encoded_rows()), timeout_seconds)
    for index, reason in bad.items():
        part, entry = entries[index]
        misfits.leave_out(part, entry)
        record = decode_entry(*entry.raw)
        position = pack(part.owned.path_epoch, entry.sequence)
        misfits.letters.append(DeadLetter(*record.identity, position, record.data, reason))
