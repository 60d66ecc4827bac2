"""One transaction a batch: rows, removals, conversations, and the fence with the flushed-through marks.

The fence comes last: until then the shards' rows stay unlocked, so that the owner's lease can be renewed
while a long COPY runs, and a stopped owner does not keep its successor waiting for them.
"""

from __future__ import annotations

import logging
from datetime import UTC, datetime
from typing import NamedTuple

from buffer.errors import BufferError
from buffer.faults import crash_halfway
from buffer.flush.batch import Batch, Entry, ShardBatch, Written
from buffer.flush.misfits import find_misfits
from buffer.metrics import Metrics
from buffer.model.ids import conversation_key
from buffer.store import dead_letters, items, removals
from buffer.store.items import NewConversation, Recorded
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


class _Mentioned(NamedTuple):
    """What a batch does to the conversations of one shard, those without a user that are known left out.

    ``new``: may have no row yet, or gain a user. ``active``: have a user, and move up in its list.
    """

    new: dict[bytes, NewConversation]
    active: list[tuple[str, str, int]]


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
        mentioned = {part.owned.shard: self._mentioned_in(part) for part in batch.parts}
        misfits: set[bytes] = set()
        try:
            async with self._database.transaction() as connection:
                await _erase(connection, batch)
                recorded = await self._write(connection, batch, mentioned)
        except (DuplicateRows, BadRows):
            recorded, misfits = await self._write_what_fits(batch, mentioned)
        self._remember(mentioned, recorded)
        return Written({conversation_key(*identity).encode() for identity in recorded.added}, misfits)

    async def _write_what_fits(
        self, batch: Batch, mentioned: dict[int, _Mentioned]
    ) -> tuple[Recorded, set[bytes]]:
        """A COPY is all or nothing: once more, without what made it fail."""
        async with self._database.transaction() as connection:
            await _erase(connection, batch)
            misfits = await find_misfits(connection, batch, self._database.timeout_seconds)
            if misfits.letters:
                await dead_letters.add(connection, misfits.letters)
            try:
                recorded = await self._write(connection, misfits.fitting(batch), mentioned)
            except (DuplicateRows, BadRows) as error:
                raise StoreRefused(f"{error}; it will be looked up once more") from error
        self._metrics["repeated_turns_total"].inc(misfits.equal_repeats)
        self._metrics["dead_lettered_turns_total"].inc(len(misfits.letters))
        for letter in misfits.letters:
            _log.error("dead letter, position %d: %s", letter.position, letter.reason)
        return recorded, misfits.conversations(batch)

    async def _write(
        self, connection: Connection, batch: Batch, mentioned: dict[int, _Mentioned]
    ) -> Recorded:
        rows = crash_halfway("flush.mid_copy", batch.encoded_rows(), batch.fresh)
        await items.copy_encoded(connection, rows, self._database.timeout_seconds)
        if cuts := batch.cuts():
            await removals.remove(connection, cuts)
        recorded = Recorded(set(), set())
        if new := [conversation for part in mentioned.values() for conversation in part.new.values()]:
            recorded = await items.add_conversations(connection, new)
        if active := [conversation for part in mentioned.values() for conversation in part.active]:
            await items.move_up(connection, sorted(active))  # in the order in which others lock them
        moves = batch.advances()
        moved = await advance(connection, self._flusher, self._lease_seconds, moves)
        fenced = {move.shard for move in moves} - moved
        if fenced:
            raise Fenced(fenced)
        if recorded.added:  # only now that the shards' rows are locked does nobody else add letters
            holders = await dead_letters.holders(connection, recorded.added)
            recorded = recorded._replace(added=recorded.added - holders)
        return recorded

    def _mentioned_in(self, part: ShardBatch) -> _Mentioned:
        known = self._known_of(part)
        for erased in part.erased():
            known.pop(erased, None)
        first: dict[bytes, Entry] = {}
        last: dict[bytes, Entry] = {}
        users: dict[bytes, bytes] = {}
        for entry in part.new():
            key, user = entry.conversation_key, entry.user
            has_user = known.get(key)
            if has_user is False and not user:
                continue
            last[key] = entry
            if not has_user:
                first.setdefault(key, entry)
                if user:
                    users.setdefault(key, user)
        new = {key: _new_conversation(entry, last[key], users.get(key)) for key, entry in first.items()}
        active = [
            (entry.tenant.decode(), entry.conversation.decode(), entry.created_ms)
            for key, entry in last.items()
            if key not in new
        ]
        return _Mentioned(new, active)

    def _known_of(self, part: ShardBatch) -> dict[bytes, bool]:
        """Conversations whose row is known to exist: key to whether it has a user.

        Nobody else erases one as long as the shard stays with this flusher, in one epoch of its path.
        """
        owned = part.owned
        held = (owned.fence, owned.path_epoch)
        if self._known.get(owned.shard, (None,))[0] != held:
            self._known[owned.shard] = (held, {})
        return self._known[owned.shard][1]

    def _remember(self, mentioned: dict[int, _Mentioned], recorded: Recorded) -> None:
        for shard, part in mentioned.items():
            known = self._known[shard][1]
            for key, conversation in part.new.items():
                known[key] = (conversation.tenant, conversation.conversation) in recorded.with_user
            while len(known) > _KNOWN_CONVERSATIONS:
                del known[next(iter(known))]


def _new_conversation(first: Entry, last: Entry, user: bytes | None) -> NewConversation:
    return NewConversation(
        first.tenant.decode(),
        first.conversation.decode(),
        user.decode() if user else None,
        datetime.fromtimestamp(first.created_ms / 1000, UTC),
        datetime.fromtimestamp(last.created_ms / 1000, UTC),
    )


async def _erase(connection: Connection, batch: Batch) -> None:
    """What the batch erases, before its rows: ids that were erased may be used again."""
    if all(part.plain for part in batch.parts):
        return
    # What is placed or set aside at this moment waits for this transaction, or is seen by it.
    await lock(connection, [part.owned.shard for part in batch.parts])
    if erasures := batch.erasures():
        await removals.erase(connection, erasures)
