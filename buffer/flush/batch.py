"""A batch: entries of several shards on their way to Postgres, and what becomes of them. Pure."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from buffer.model.position import pack
from buffer.model.record import Record, decode_entry
from buffer.policy.merge import Removal
from buffer.store.items import Cut, Row
from buffer.store.shards import Advance, Owned
from buffer.stream.shards import Settlement

# One settle script touches this many entries: Redis does nothing else meanwhile.
SETTLE_STEP = 500

RawEntry = tuple[bytes, bytes, bytes]


@dataclass(slots=True)
class ShardBatch:
    """Consecutive entries of one shard, from just after ``before``.

    Those up to sequence ``committed`` are in Postgres already and only need to be settled.
    """

    owned: Owned
    before: int
    committed: int
    records: list[Record]
    nbytes: list[int]

    @property
    def through(self) -> int:
        """The last sequence of the batch."""
        return self.records[-1].sequence

    def fresh(self) -> list[Record]:
        """The records that Postgres does not have."""
        if self.records[0].sequence > self.committed:
            return self.records
        return [record for record in self.records if record.sequence > self.committed]

    def settlements(self) -> list[Settlement]:
        """The steps by which Redis forgets the batch."""
        steps = []
        before = self.before
        for at in range(0, len(self.records), SETTLE_STEP):
            part = self.records[at : at + SETTLE_STEP]
            conversations = Counter(record.conversation_key for record in part)
            nbytes = sum(self.nbytes[at : at + SETTLE_STEP])
            steps.append(Settlement(before, part[-1].sequence, nbytes, dict(conversations)))
            before = part[-1].sequence
        return steps


@dataclass(slots=True)
class Batch:
    """What one transaction writes. ``full``: a limit cut it off, so there is more to flush at once."""

    parts: list[ShardBatch]
    full: bool
    fetched_at: float
    fresh: int = field(init=False)

    def __post_init__(self) -> None:
        self.fresh = sum(len(part.fresh()) for part in self.parts)

    def rows(self) -> tuple[list[Row], list[Cut]]:
        """Rows to insert, and removals. A row that a later entry of the batch removes has no data."""
        rows: list[Row] = []
        cuts: list[Cut] = []
        for part in self.parts:
            rows += _rows(part.owned.path_epoch, part.fresh(), cuts)
        if cuts:
            rows = _without_removed(rows, cuts)
        return rows, cuts

    def advances(self) -> list[Advance]:
        """How far each shard moves; parts that were committed before do not."""
        return [
            Advance(p.owned.shard, p.owned.fence, p.owned.path_epoch, pack(p.owned.path_epoch, p.through), n)
            for p in self.parts
            if (n := len(p.fresh()))
        ]

    def without(self, shards: Iterable[int]) -> Batch:
        """The batch without some shards."""
        gone = set(shards)
        return Batch([p for p in self.parts if p.owned.shard not in gone], self.full, self.fetched_at)


def decode(entries: Sequence[RawEntry]) -> tuple[list[Record], list[int]]:
    """The records and their sizes as the append script counted them.

    Raises:
        UnknownRecordFormat: an entry of a newer release.
    """
    return [decode_entry(*entry) for entry in entries], [len(h) + len(d) for _, h, d in entries]


def _rows(epoch: int, records: Sequence[Record], cuts: list[Cut]) -> list[Row]:
    base = pack(epoch, 0)
    rows = []
    for record in records:
        position = base + record.sequence
        data = record.data.decode()
        rows.append(Row(record.tenant, record.conversation, position, record.item_id, record.created_at, data))
        if record.replace_after is not None:
            cuts.append(Cut(record.tenant, record.conversation, record.replace_after, position))
    return rows


def _without_removed(rows: list[Row], cuts: list[Cut]) -> list[Row]:
    removals: dict[tuple[str, str], list[Removal]] = {}
    for cut in cuts:
        removals.setdefault((cut.tenant, cut.conversation), []).append(Removal(cut.after, cut.before))
    return [
        row._replace(data=None)
        if any(r.covers(row.position) for r in removals.get((row.tenant, row.conversation), ()))
        else row
        for row in rows
    ]
