"""What this process acked, or showed to a reader, and Postgres does not have yet.

Redis may lose everything it holds: what is retained here is written to Postgres then. An item is released
by a flushed-through mark of its own epoch, and by nothing else.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from datetime import UTC, datetime
from operator import attrgetter

from buffer.model.position import pack
from buffer.model.record import split_header
from buffer.store.placing import Placed
from buffer.stream.shards import RawEntry

# What an item costs here beside its payload: header, digests, and the objects around them; measured
# by `buffer bench retention`.
OVERHEAD_BYTES = 700

# Sequence to (bytes, number of items, the append's arguments: four an item, header third, payload fourth).
Kept = dict[int, tuple[int, int, Sequence[bytes]]]


class Retention:
    """Retained items by shard and epoch."""

    def __init__(self, shards: int) -> None:
        self._kept: list[dict[int, Kept]] = [{} for _ in range(shards)]
        self.bytes = 0
        self.turns = 0

    def epoch(self, shard: int, epoch: int) -> Kept:
        """What is retained of an epoch of a shard; the append path adds to it, and to the totals."""
        epochs = self._kept[shard]
        kept = epochs.get(epoch)
        if kept is None:
            kept = epochs[epoch] = {}
        return kept

    def keep(
        self, shard: int, epoch: int, sequence: int, count: int, arguments: Sequence[bytes], nbytes: int
    ) -> None:
        """Retain an append whose first item is ``sequence``."""
        kept = self.epoch(shard, epoch)
        if sequence not in kept:
            nbytes += count * OVERHEAD_BYTES
            kept[sequence] = (nbytes, count, arguments)
            self.bytes += nbytes
            self.turns += count

    def keep_entries(self, shard: int, epoch: int, entries: Sequence[RawEntry]) -> None:
        """Retain what a reader is about to be shown from the tail."""
        for entry_id, header, data in entries:
            sequence = int(entry_id[entry_id.index(b"-") + 1 :])
            self.keep(shard, epoch, sequence, 1, (b"", b"", header, data), len(data))

    def release(self, shard: int, epoch: int, through: int) -> None:
        """Forget what a mark of that epoch covers."""
        kept = self._kept[shard].get(epoch)
        if not kept:
            return
        passed = []
        for sequence, (_, count, _) in kept.items():
            if sequence + count - 1 <= through:
                passed.append(sequence)
            elif sequence > through:
                break  # acks come in order but for repeats, which wait for what stands before them
        self._forget(kept, passed)

    def older(self, shard: int, epoch: int) -> list[Placed]:
        """What is retained of epochs before one, in the order of positions."""
        rows = [
            row
            for kept_epoch, kept in self._kept[shard].items()
            if kept_epoch < epoch
            for row in _placed(kept_epoch, kept)
        ]
        return sorted(rows, key=attrgetter("position"))

    def drop_older(self, shard: int, epoch: int) -> None:
        """Forget epochs before one: Postgres has them."""
        for kept_epoch in [e for e in self._kept[shard] if e < epoch]:
            kept = self._kept[shard].pop(kept_epoch)
            self._forget(kept, list(kept))

    def shards(self) -> list[int]:
        """The shards of which something is retained."""
        return [shard for shard, epochs in enumerate(self._kept) if any(epochs.values())]

    def _forget(self, kept: Kept, sequences: list[int]) -> None:
        for sequence in sequences:
            nbytes, count, _ = kept.pop(sequence)
            self.bytes -= nbytes
            self.turns -= count


def _placed(epoch: int, kept: Kept) -> Iterator[Placed]:
    for sequence, (_, count, arguments) in kept.items():
        for index in range(count):
            header, data = arguments[4 * index + 2], arguments[4 * index + 3]
            yield placed(pack(epoch, sequence + index), header, data)


def placed(position: int, header: bytes, data: bytes) -> Placed:
    """An entry's header and payload as a row."""
    _, kind, tenant, conversation, item_id, user, created_ms, cut, _, _ = split_header((b"", header, data))
    return Placed(
        tenant.decode(),
        conversation.decode(),
        position,
        item_id.decode(),
        datetime.fromtimestamp(int(created_ms) / 1000, UTC),
        data,
        int(cut) if cut else None,
        user.decode() or None,
        kind.decode(),
    )
