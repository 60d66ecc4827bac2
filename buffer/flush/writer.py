"""One transaction a batch: rows, removals, conversations, and the fence with the flushed-through marks.

The fence comes last: until then the shards' rows stay unlocked, so that the owner's lease can be renewed
while a long COPY runs, and a stopped owner does not keep its successor waiting for them.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence

from buffer.errors import BufferError
from buffer.faults import crash_halfway
from buffer.flush.batch import Batch, ShardBatch, Written
from buffer.flush.misfits import find_misfits
from buffer.metrics import Metrics
from buffer.model.ids import conversation_key
from buffer.model.record import decode_entry
from buffer.store import dead_letters, items, removals
from buffer.store.items import NewConversation
from buffer.store.paths import lock
from buffer.store.pool import BadRows, Connection, Database, DuplicateRows, StoreRefused
from buffer.store.shards import advance

_log = logging.getLogger(__name__)

# Conversations of a shard whose row is known to exist; forgetting one costs one statement.
_KNOWN_CONVERSATIONS = 50_000


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
        self._known: dict[int, tuple[tuple[int, int], dict[bytes, bool]]] = {}

    async def write(self, batch: Batch) -> Written:
        """Commit the batch, whole.

        Raises:
            Fenced: a shard is not ours any more; nothing was written.
            PostgresUnavailable: try again; it may be committed all the same, the mark tells.
            StoreRefused: nothing was written, and somebody has to act.
        """
        found = self._new_conversations(batch)
        new = [conversation for part in found.values() for conversation in part.values()]
        misfits: set[bytes] = set()
        try:
            async with self._database.transaction() as connection:
                await _erase(connection, batch)
                begun = await self._write(connection, batch, new)
        except (DuplicateRows, BadRows):
            begun, misfits = await self._write_what_fits(batch, new)
        self._remember(found)
        return Written(begun, misfits)

    async def _write_what_fits(
        self, batch: Batch, new: Sequence[NewConversation]
    ) -> tuple[set[bytes], set[bytes]]:
        """A COPY is all or nothing: once more, without what made it fail."""
        async with self._database.transaction() as connection:
            await _erase(connection, batch)
            misfits = await find_misfits(connection, batch, self._database.timeout_seconds)
            if misfits.letters:
                await dead_letters.add(connection, misfits.letters)
            try:
                begun = await self._write(connection, misfits.fitting(batch), new)
            except (DuplicateRows, BadRows) as error:
                raise StoreRefused(f"{error}; it will be looked up once more") from error
        self._metrics["repeated_turns_total"].inc(misfits.equal_repeats)
        self._metrics["dead_lettered_turns_total"].inc(len(misfits.letters))
        for letter in misfits.letters:
            _log.error("dead letter, position %d: %s", letter.position, letter.reason)
        return begun, misfits.conversations(batch)

    async def _write(
        self, connection: Connection, batch: Batch, new: Sequence[NewConversation]
    ) -> set[bytes]:
        rows = crash_halfway("flush.mid_copy", batch.encoded_rows(), batch.fresh)
        await items.copy_encoded(connection, rows, self._database.timeout_seconds)
        if cuts := batch.cuts():
            await removals.remove(connection, cuts)
        begun = await items.add_conversations(connection, new) if new else set()
        moves = batch.advances()
        moved = await advance(connection, self._flusher, self._lease_seconds, moves)
        fenced = {move.shard for move in moves} - moved
        if fenced:
            raise Fenced(fenced)
        if begun:  # only now that the shards' rows are locked does nobody else add letters
            begun -= await dead_letters.holders(connection, begun)
        return {conversation_key(*identity).encode() for identity in begun}

    def _new_conversations(self, batch: Batch) -> dict[int, dict[bytes, NewConversation]]:
        """By shard, the conversations that may have no row yet, or whose user was not known before."""
        return {part.owned.shard: self._new_in(part) for part in batch.parts}

    def _new_in(self, part: ShardBatch) -> dict[bytes, NewConversation]:
        known = self._known_of(part)
        found: dict[bytes, NewConversation] = {}
        for erased in part.erased():
            known.pop(erased, None)
        for entry in part.new():
            key, user = entry.conversation_key, entry.user
            if key in known and (not user or known[key]):
                continue
            seen = found.get(key)
            if seen is None or (seen.user is None and user):
                record = decode_entry(*entry.raw)
                created_at = seen.created_at if seen else record.created_at
                found[key] = NewConversation(record.tenant, record.conversation, record.user, created_at)
        return found

    def _known_of(self, part: ShardBatch) -> dict[bytes, bool]:
        """Conversations whose row is known to exist: key to whether it has a user.

        Nobody else erases one as long as the shard stays with this flusher, in one epoch of its path.
        """
        owned = part.owned
        held = (owned.fence, owned.path_epoch)
        if self._known.get(owned.shard, (None,))[0] != held:
            self._known[owned.shard] = (held, {})
        return self._known[owned.shard][1]

    def _remember(self, new: dict[int, dict[bytes, NewConversation]]) -> None:
        for shard, conversations in new.items():
            known = self._known[shard][1]
            for key, conversation in conversations.items():
                known[key] = known.get(key, False) or conversation.user is not None
            while len(known) > _KNOWN_CONVERSATIONS:
                del known[next(iter(known))]


async def _erase(connection: Connection, batch: Batch) -> None:
    """What the batch erases, before its rows: ids that were erased may be used again."""
    if all(part.plain for part in batch.parts):
        return
    # What is placed or set aside at this moment waits for this transaction, or is seen by it.
    await lock(connection, [part.owned.shard for part in batch.parts])
    if erasures := batch.erasures():
        await removals.erase(connection, erasures)
