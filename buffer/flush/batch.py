"""A batch: entries of several shards on their way to Postgres, and what becomes of them. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import msgspec

from buffer.model.position import pack
from buffer.model.record import ERASE, ITEM, Removal, UnknownRecordFormat, removal, split_header
from buffer.store.copy_format import encode_row
from buffer.store.removals import Cut, Erasure
from buffer.store.shards import Advance, Owned
from buffer.stream.shards import RawEntry, Settlement

# One settle script touches this many entries: Redis does nothing else meanwhile.
SETTLE_STEP = 250


class Entry(msgspec.Struct, frozen=True, gc=False):
    """One entry as a flush needs it: still in bytes, since Postgres gets bytes as well.

    A flush holds thousands of them and no cycle, so the garbage collector need not walk them.
    """

    sequence: int
    kind: str
    conversation_key: bytes
    tenant: bytes
    conversation: bytes
    item_id: bytes
    user: bytes
    created_ms: int
    cut: int | None
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
            _, kind, tenant, conversation, item_id, user, created_ms, cut, _, _ = split_header(raw)
        except UnknownRecordFormat as error:
            return decoded, error
        entry_id, header, data = raw
        decoded.append(
            Entry(
                int(entry_id[entry_id.index(b"-") + 1 :]),
                kind.decode(),
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


class Written(NamedTuple):
    """What the commit of a batch showed.

    ``begun``: conversations of which there was nothing before; ``misfits``: those that have some.
    """

    begun: set[bytes]
    misfits: set[bytes]


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
    plain: bool = field(init=False)  # nothing but items that replace nothing

    def __post_init__(self) -> None:
        self.plain = all(entry.cut is None and entry.kind == ITEM for entry in self.entries)

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
        """The items that Postgres gets: fresh, no repeats, and not erased by a later entry of the batch."""
        fresh = self.fresh()
        if self.repeats:
            fresh = [e for e in fresh if e.sequence not in self.repeats]
        if not self.plain:
            erased = self.erased()
            fresh = [e for e in fresh if e.kind == ITEM and e.sequence > erased.get(e.conversation_key, -1)]
        return fresh

    def erased(self) -> dict[bytes, int]:
        """The last sequence at which each conversation is erased."""
        if self.plain:
            return {}
        return {e.conversation_key: e.sequence for e in self.fresh() if e.kind == ERASE}

    def settlements(self, written: Written) -> list[Settlement]:
        """The steps by which the batch leaves the tails and enters the views."""
        steps = []
        before = self.before
        begun = set(written.begun)
        dropped = self._not_as_they_are() | written.misfits
        for at in range(0, len(self.entries), SETTLE_STEP):
            part = self.entries[at : at + SETTLE_STEP]
            conversations = list(dict.fromkeys(entry.conversation_key for entry in part))
            nbytes = sum([len(entry.header) + len(entry.data) for entry in part])
            views = "".join("x" if key in dropped else "n" if key in begun else "a" for key in conversations)
            steps.append(Settlement(before, part[-1].sequence, nbytes, conversations, views.encode()))
            before = part[-1].sequence
            begun.difference_update(conversations)
        return steps

    def _not_as_they_are(self) -> set[bytes]:
        """Conversations whose entries do not simply follow what a view holds.

        Those that remove; and those that somebody else committed, who knows what became of them.
        """
        keys = {e.conversation_key for e in self.entries if e.sequence <= self.committed}
        if not self.plain:
            keys |= {e.conversation_key for e in self.entries if e.cut is not None or e.kind != ITEM}
        return keys

    def cuts(self) -> list[tuple[Entry, Removal]]:
        """The entries that remove items. A repeat removes nothing, nor does what is erased."""
        if self.plain:
            return []
        erased = self.erased()
        found = []
        for entry in self.fresh():
            if entry.kind == ERASE or (entry.kind == ITEM and entry.cut is None):
                continue
            if entry.sequence in self.repeats or entry.sequence < erased.get(entry.conversation_key, -1):
                continue
            removed = removal(entry.kind, entry.cut, self.position(entry))
            if removed is not None:
                found.append((entry, removed))
        return found

    def changed(self) -> frozenset[bytes]:
        """Conversations of which items are removed or erased."""
        if self.plain:
            return frozenset()
        return frozenset(e.conversation_key for e in self.fresh() if e.kind != ITEM or e.cut is not None)

    def position(self, entry: Entry) -> int:
        """An entry's position."""
        return pack(self.owned.path_epoch, entry.sequence)


@dataclass(slots=True)
class Batch:
    """What one transaction writes. ``full``: a limit cut it off, so there is more to flush at once."""

    parts: list[ShardBatch]
    full: bool
    fetched_at: float
    written: Written = field(default_factory=lambda: Written(set(), set()))
    fresh: int = field(init=False)

    def __post_init__(self) -> None:
        self.fresh = sum(len(part.fresh()) for part in self.parts)

    def encoded_rows(self) -> Iterator[bytes]:
        """The rows in COPY's binary format. One that a later entry of the batch removes has no data."""
        for part in self.parts:
            base = pack(part.owned.path_epoch, 0)
            cuts: dict[bytes, list[Removal]] = {}
            for entry, removed in part.cuts():
                cuts.setdefault(entry.conversation_key, []).append(removed)
            for entry in part.new():
                position = base + entry.sequence
                gone = cuts and any(r.covers(position) for r in cuts.get(entry.conversation_key, ()))
                data = None if gone else entry.data
                yield encode_row(
                    entry.tenant, entry.conversation, position, entry.item_id, entry.created_ms, data
                )

    def without(self, repeats: Mapping[int, frozenset[int]]) -> Batch:
        """The batch without repeats: shard to sequences. They still count as flushed."""
        parts = [replace(part, repeats=repeats.get(part.owned.shard, frozenset())) for part in self.parts]
        return Batch(parts, self.full, self.fetched_at)

    def cuts(self) -> list[Cut]:
        """What the batch removes, from its own rows or earlier ones."""
        return [
            Cut(
                entry.tenant.decode(),
                entry.conversation.decode(),
                part.position(entry),
                *removed,
                None if entry.kind == ITEM else entry.item_id.decode(),
            )
            for part in self.parts
            for entry, removed in part.cuts()
        ]

    def erasures(self) -> list[Erasure]:
        """What the batch erases."""
        return [
            Erasure(tenant, conversation, pack(part.owned.path_epoch, sequence))
            for part in self.parts
            for key, sequence in part.erased().items()
            for tenant, conversation in [key.decode().split("/")]
        ]

    def advances(self) -> list[Advance]:
        """How far each shard moves; parts that were committed before do not."""
        return [
            Advance(p.owned.shard, p.owned.fence, p.owned.path_epoch, pack(p.owned.path_epoch, p.through), n)
            for p in self.parts
            if (n := len(p.fresh()))
        ]
