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
from buffer.model.record import decode_entry
from buffer.store import items
from buffer.store.items import DeadLetter, NewConversation, Row
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
                rows = crash_halfway("flush.mid_copy", batch.encoded_rows(), batch.fresh)
                await items.copy_encoded(connection, rows)
                await self._finish(connection, batch, new)
        except DuplicateRows:
            # A COPY is all or nothing: write the batch again, leaving out what is there.
            async with self._database.transaction() as connection:
                letters = await self._insert_one_by_one(connection, batch.rows())
                await self._finish(connection, batch, new)
        if letters:
            self._metrics["dead_lettered_turns_total"].inc(len(letters))
        self._remember(new)

    async def _finish(self, connection: Connection, batch: Batch, new: Sequence[NewConversation]) -> None:
        if cuts := batch.cuts():
            await items.remove_between(connection, cuts)
        if new:
            await items.add_conversations(connection, new)
        moves = batch.advances()
        moved = await advance(connection, self._flusher, self._lease_seconds, moves)
        fenced = {move.shard for move in moves} - moved
        if fenced:
            raise Fenced(fenced)

    async def _insert_one_by_one(self, connection: Connection, rows: list[Row]) -> list[DeadLetter]:
        """Insert what is new; an equal repeat is left out, an unequal one becomes a dead letter."""
        try:
            stored = await items.insert_new(connection, rows)
        except DuplicateRows as error:
            raise StoreRefused(f"a position is taken by another item: {error}") from error
        repeats = [row for row in rows if (row.tenant, row.conversation, row.position) not in stored]
        if not repeats:
            return []
        there = await items.present(connection, [(r.tenant, r.conversation, r.item_id) for r in repeats])
        letters = []
        for row in repeats:
            position, data = there[row.tenant, row.conversation, row.item_id]
            if position == row.position or row.data is None:
                continue
            if data is not None and equal_as_json(row.data, data):
                self._metrics["repeated_turns_total"].inc()
                continue
            reason = (
                "the id belongs to a removed item" if data is None else "the id is stored with another body"
            )
            letters.append(
                DeadLetter(
                    row.tenant,
                    row.conversation,
                    row.item_id,
                    row.position,
                    row.data.encode(),
                    f"{reason} (position {position})",
                )
            )
        if letters:
            await items.add_dead_letters(connection, letters)
        return letters

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
