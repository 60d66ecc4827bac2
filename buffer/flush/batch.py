"""A batch: entries of several shards on their way to Postgres, and what becomes of them. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace

import msgspec

from buffer.model.position import pack
from buffer.model.record import UnknownRecordFormat, split_header
from buffer.policy.merge import Removal
from buffer.store.copy_format import encode_row
from buffer.store.items import Cut
from buffer.store.shards import Advance, Owned
from buffer.stream.shards import RawEntry, Settlement

# One settle script touches this many entries: Redis does nothing else meanwhile.
SETTLE_STEP = 500


class Entry(msgspec.Struct, frozen=True, gc=False):
    """One entry as a flush needs it: still in bytes, since Postgres gets bytes as well.

    A flush holds thousands of them and no cycle, so the garbage collector need not walk them.
    """

    sequence: int
    conversation_key: bytes
    tenant: bytes
    conversation: bytes
    item_id: bytes
    user: bytes
    created_ms: int
    replace_after: int | None
    entry_id: bytes
    header: bytes
    data: bytes

    @property
    def raw(self) -> RawEntry:
        """The entry as it stands in the stream."""
        return self.entry_id, self.header, self.data


def decode(entries: Iterable[RawEntry]) -> tuple[list[Entry], UnknownRecordFormat | None]:
    """The entries with their headers split, up to one of a newer release; and what was met there."""
    decoded: list[Entry] = []
    for raw in entries:
        try:
            _, _, tenant, conversation, item_id, user, created_ms, cut, _, _ = split_header(raw)
        except UnknownRecordFormat as error:
            return decoded, error
        entry_id, header, data = raw
        decoded.append(
            Entry(
                int(entry_id[entry_id.index(b"-") + 1 :]),
                b"%b/%b" % (tenant, conversation),
                tenant,
                conversation,
                item_id,
                user,
                int(created_ms),
                int(cut) if cut else None,
                entry_id,
                header,
                data,
            )
        )
    return decoded, None


@dataclass(slots=True)
class ShardBatch:
    """Consecutive entries of one shard, from just after ``before``.

    Those up to sequence ``committed`` are in Postgres already and only need to be settled.
    """

    owned: Owned
    before: int
    committed: int
    entries: list[Entry]
    repeats: frozenset[int] = frozenset()  # sequences whose id is stored already

    @property
    def through(self) -> int:
        """The last sequence of the batch."""
        return self.entries[-1].sequence

    def fresh(self) -> list[Entry]:
        """The entries that Postgres does not have."""
        if self.entries[0].sequence > self.committed:
            return self.entries
        return [entry for entry in self.entries if entry.sequence > self.committed]

    def new(self) -> list[Entry]:
        """The fresh entries without the repeats: what Postgres gets. A repeat removes nothing either."""
        fresh = self.fresh()
        return [e for e in fresh if e.sequence not in self.repeats] if self.repeats else fresh

    def settlements(self) -> list[Settlement]:
        """The steps by which Redis forgets the batch."""
        steps = []
        before = self.before
        for at in range(0, len(self.entries), SETTLE_STEP):
            part = self.entries[at : at + SETTLE_STEP]
            conversations = list(dict.fromkeys(entry.conversation_key for entry in part))
            nbytes = sum([len(entry.header) + len(entry.data) for entry in part])
            steps.append(Settlement(before, part[-1].sequence, nbytes, conversations))
            before = part[-1].sequence
        return steps

    def removals(self) -> dict[bytes, list[Removal]]:
        """What the new entries remove, by conversation."""
        found: dict[bytes, list[Removal]] = {}
        for entry in self.new():
            if entry.replace_after is not None:
                position = pack(self.owned.path_epoch, entry.sequence)
                found.setdefault(entry.conversation_key, []).append(Removal(entry.replace_after, position))
        return found


@dataclass(slots=True)
class Batch:
    """What one transaction writes. ``full``: a limit cut it off, so there is more to flush at once."""

    parts: list[ShardBatch]
    full: bool
    fetched_at: float
    fresh: int = field(init=False)

    def __post_init__(self) -> None:
        self.fresh = sum(len(part.fresh()) for part in self.parts)

    def encoded_rows(self) -> Iterator[bytes]:
        """The rows in COPY's binary format. One that a later entry of the batch removes has no data."""
        for part in self.parts:
            base = pack(part.owned.path_epoch, 0)
            removals = part.removals()
            for entry in part.new():
                position = base + entry.sequence
                removed = removals and _removed(removals, entry.conversation_key, position)
                data = None if removed else entry.data
                yield encode_row(
                    entry.tenant, entry.conversation, position, entry.item_id, entry.created_ms, data
                )

    def without(self, repeats: Mapping[int, frozenset[int]]) -> Batch:
        """The batch without repeats: shard to sequences. They still count as flushed."""
        parts = [replace(part, repeats=repeats.get(part.owned.shard, frozenset())) for part in self.parts]
        return Batch(parts, self.full, self.fetched_at)

    def cuts(self) -> list[Cut]:
        """What the batch removes from earlier rows."""
        return [
            Cut(tenant, conversation, removal.after, removal.before)
            for part in self.parts
            for key, removals in part.removals().items()
            for tenant, conversation in [key.decode().split("/")]
            for removal in removals
        ]

    def advances(self) -> list[Advance]:
        """How far each shard moves; parts that were committed before do not."""
        return [
            Advance(p.owned.shard, p.owned.fence, p.owned.path_epoch, pack(p.owned.path_epoch, p.through), n)
            for p in self.parts
            if (n := len(p.fresh()))
        ]


def _removed(removals: dict[bytes, list[Removal]], key: bytes, position: int) -> bool:
    return any(removal.covers(position) for removal in removals.get(key, ()))
