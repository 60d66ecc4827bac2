"""One transaction a batch: rows, removals, conversations, and the fence with the flushed-through marks.

The fence comes last: until then the shards' rows stay unlocked, so that the owner's lease can be renewed
while a long COPY runs, and a stopped owner does not keep its successor waiting for them.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence

from buffer.errors import BufferError
from buffer.faults import crash_halfway
from buffer.flush.batch import Batch
from buffer.metrics import Metrics
from buffer.model.codec import equal_as_json
from buffer.model.ids import conversation_key
from buffer.model.position import pack
from buffer.model.record import Record, decode_entry
from buffer.store import items
from buffer.store.items import DeadLetter, NewConversation
from buffer.store.pool import Connection, Database, DuplicateRows, StoreRefused
from buffer.store.shards import advance

# Conversations whose row is known to exist; forgetting one costs one statement.
_KNOWN_CONVERSATIONS = 100_000


class Fenced(BufferError):
    """Some of the batch's shards have another owner or epoch now; nothing was written."""

    def __init__(self, shards: set[int]) -> None:
        super().__init__(f"shards {sorted(shards)} have another owner")
        self.shards = shards


class Writer:
    """Writes the batches of one flusher."""

    def __init__(self, database: Database, flusher: str, lease_seconds: float, metrics: Metrics) -> None:
        self._database = database
        self._flusher = flusher
        self._lease_seconds = lease_seconds
        self._metrics = metrics
        self._known: OrderedDict[bytes, bool] = OrderedDict()  # key to: has a user

    async def write(self, batch: Batch) -> None:
        """Commit the batch, whole.

        Raises:
            Fenced: a shard is not ours any more; nothing was written.
            PostgresUnavailable: try again; it may be committed all the same, the mark tells.
            BadRows, StoreRefused: nothing was written.
        """
        new = self._new_conversations(batch)
        letters: list[DeadLetter] = []
        try:
            async with self._database.transaction() as connection:
                await self._write(connection, batch, new)
        except DuplicateRows:
            # Somebody repeated an id after the idempotency window. A COPY is all or nothing: once more,
            # without the repeats.
            async with self._database.transaction() as connection:
                batch, letters = await self._without_repeats(connection, batch)
                try:
                    await self._write(connection, batch, new)
                except DuplicateRows as error:
                    raise StoreRefused(f"{error}; it will be looked up once more") from error
        if letters:
            self._metrics["dead_lettered_turns_total"].inc(len(letters))
        self._remember(new)

    async def _write(self, connection: Connection, batch: Batch, new: Sequence[NewConversation]) -> None:
        rows = crash_halfway("flush.mid_copy", batch.encoded_rows(), batch.fresh)
        await items.copy_encoded(connection, rows, self._database.timeout_seconds)
        if cuts := batch.cuts():
            await items.remove_between(connection, cuts)
        if new:
            await items.add_conversations(connection, new)
        moves = batch.advances()
        moved = await advance(connection, self._flusher, self._lease_seconds, moves)
        fenced = {move.shard for move in moves} - moved
        if fenced:
            raise Fenced(fenced)

    async def _without_repeats(self, connection: Connection, batch: Batch) -> tuple[Batch, list[DeadLetter]]:
        """Leave out entries whose id is stored; an unequal one becomes a dead letter."""
        fresh = [(part, decode_entry(*entry.raw)) for part in batch.parts for entry in part.fresh()]
        stored: dict[tuple[str, str, str], tuple[int | None, str | None]] = {
            **await items.present(connection, [record.identity for _, record in fresh])
        }
        repeats: dict[int, set[int]] = {}
        letters = []
        for part, record in fresh:
            position = pack(part.owned.path_epoch, record.sequence)
            first, data = stored.setdefault(record.identity, (None, record.data.decode()))
            if first is None:  # not stored; the next entry of this id, if there is one, is a repeat
                stored[record.identity] = (position, data)
                continue
            repeats.setdefault(part.owned.shard, set()).add(record.sequence)
            if first != position:
                letters += self._unequal(record, position, first, data)
        if letters:
            await items.add_dead_letters(connection, letters)
        return batch.without({shard: frozenset(found) for shard, found in repeats.items()}), letters

    def _unequal(self, record: Record, position: int, first: int, data: str | None) -> list[DeadLetter]:
        if data is not None and equal_as_json(record.data, data):
            self._metrics["repeated_turns_total"].inc()
            return []
        reason = "belongs to a removed item" if data is None else "is stored with another body"
        reason = f"the id {reason}, at position {first}"
        return [DeadLetter(*record.identity, position, record.data, reason)]

    def _new_conversations(self, batch: Batch) -> list[NewConversation]:
        """Conversations that may have no row yet, or whose user was not known before."""
        found: dict[bytes, NewConversation] = {}
        known = self._known
        for part in batch.parts:
            for entry in part.fresh():
                key, user = entry.conversation_key, entry.parts[5]
                if key in known and (not user or known[key]):
                    continue
                seen = found.get(key)
                if seen is None or (seen.user is None and user):
                    record = decode_entry(*entry.raw)
                    created_at = seen.created_at if seen else record.created_at
                    found[key] = NewConversation(record.tenant, record.conversation, record.user, created_at)
        return list(found.values())

    def _remember(self, new: Sequence[NewConversation]) -> None:
        for conversation in new:
            key = conversation_key(conversation.tenant, conversation.conversation).encode()
            self._known[key] = conversation.user is not None
        while len(self._known) > _KNOWN_CONVERSATIONS:
            self._known.popitem(last=False)
