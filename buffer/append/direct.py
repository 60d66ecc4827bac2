"""Appends straight into Postgres, while the path of their shard is direct.

As on the way to Redis, those that wait travel together: one transaction takes them all. It locks the rows
of their shards, so that numbers are given out in one order, and nothing is stored twice whichever process
it comes through.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
from collections.abc import Callable, Iterator, Sequence

from buffer.append.operation import Operation
from buffer.errors import (
    BufferError,
    Conflict,
    InvalidRequest,
    PostgresUnavailable,
    PreconditionFailed,
    Unavailable,
)
from buffer.model.codec import equal_as_json
from buffer.model.position import pack
from buffer.model.record import ERASE
from buffer.model.types import Receipt
from buffer.path.member import Member
from buffer.path.retention import placed
from buffer.store import items
from buffer.store.items import Identity
from buffer.store.paths import Locked, count_direct, lock
from buffer.store.placing import Placed, last_positions, place
from buffer.store.pool import BadRows, Connection, Database, DuplicateRows

_log = logging.getLogger(__name__)

_MOST_ITEMS = 2_000
_MOST_BYTES = 8 << 20

# What became of an operation: its receipts, or the error that its caller gets.
Outcome = list[Receipt] | BufferError


class Direct:
    """The queue in front of Postgres, and the task that empties it."""

    def __init__(
        self,
        database: Database,
        member: Member,
        put_back: Callable[[Sequence[Operation]], None],
        deliver: Callable[[Operation, Outcome], None],
    ) -> None:
        self._database = database
        self._member = member
        self._put_back = put_back
        self._deliver = deliver
        self._waiting: list[Operation] = []
        self._looking_up: list[Operation] = []
        self._wakeup = asyncio.Event()
        self.under_way: dict[Operation, None] = {}

    def submit(self, operations: Sequence[Operation]) -> None:
        """Append these directly."""
        self._waiting += operations
        self._wakeup.set()

    def everything(self) -> Iterator[Operation]:
        """All operations that are here."""
        return itertools.chain(self._waiting, self._looking_up, self.under_way)

    def look_up(self, operations: Sequence[Operation]) -> None:
        """See whether Postgres knows the ids of these; those that it does not know are put back."""
        self._looking_up += operations
        self._wakeup.set()

    async def run(self) -> None:
        """Serve the queue until cancelled."""
        while True:
            await self._wakeup.wait()
            self._wakeup.clear()
            while self._waiting or self._looking_up:
                if self._looking_up:
                    batch, self._looking_up = self._looking_up, []
                    await self._guarded(batch, self._answer_known(batch))
                if self._waiting:
                    batch = self._take()
                    await self._guarded(batch, self._append(batch))

    def _take(self) -> list[Operation]:
        count, turns, nbytes = 0, 0, 0
        for operation in self._waiting:
            turns += len(operation.ids)
            nbytes += operation.nbytes
            if count and (turns > _MOST_ITEMS or nbytes > _MOST_BYTES):
                break
            count += 1
        batch, self._waiting = self._waiting[:count], self._waiting[count:]
        return [operation for operation in batch if not self._given_up(operation)]

    def _given_up(self, operation: Operation) -> bool:
        if operation.future.done():
            self._put_back([operation])  # which lets go of it
        return operation.future.done()

    async def _guarded(self, batch: list[Operation], work: object) -> None:
        """Whatever happens, everyone of the batch is answered or put back."""
        self.under_way = dict.fromkeys(batch)
        try:
            await work  # type: ignore[misc]
        except BufferError as error:
            if not isinstance(error, Unavailable):
                _log.error("direct appends are refused, and tried again: %s", error)
            self._member.suspect()
            for operation in self.under_way:
                operation.trouble = str(error)
                operation.maybe_stored |= operation.in_flight
                operation.in_flight = False
            await asyncio.sleep(0.02)
        left, self.under_way = self.under_way, {}
        self._put_back(list(left))  # which lets go of those whose caller gave up

    def _done(self, operation: Operation, outcome: Outcome) -> None:
        del self.under_way[operation]
        self._deliver(operation, outcome)

    async def _append(self, batch: list[Operation]) -> None:
        if not batch:
            return
        for operation in batch:
            operation.in_flight = True  # from here on: the commit may succeed and its answer be lost
        try:
            outcomes = await self._store(batch)
        except (BadRows, DuplicateRows):
            for operation in batch:  # one of them is at fault
                await self._append_alone(operation)
            return
        for operation in batch:
            operation.in_flight = False
        for operation, outcome in outcomes:
            self._done(operation, outcome)

    async def _append_alone(self, operation: Operation) -> None:
        try:
            outcomes = await self._store([operation])
        except (BadRows, DuplicateRows) as error:
            outcomes = [(operation, InvalidRequest(f"Postgres refuses this item: {error}", param="items"))]
        operation.in_flight = False
        for _, outcome in outcomes:
            self._done(operation, outcome)

    async def _store(self, batch: list[Operation]) -> list[tuple[Operation, Outcome]]:
        """One transaction; what became of those whose shard is direct in their process's epoch."""
        async with self._database.transaction() as connection:
            rows = await lock(connection, {operation.shard for operation in batch})
            states = self._member.states
            current = [op for op in batch if states[op.shard].at(rows[op.shard].epoch, rows[op.shard].mode)]
            current = [op for op in current if states[op.shard].mode == "direct"]
            if len(current) < len(batch):
                self._member.suspect()
            if not current:
                return []
            writing = _Writing(rows, {shard: states[shard].clean for shard in rows})
            await writing.look(connection, current)
            outcomes = [(operation, writing.decide(operation)) for operation in current]
            if writing.rows:
                new = await place(connection, writing.rows)
                if not new.issuperset(row.identity for row in writing.rows):
                    # Only an import writes beside us. Nothing was committed: the next try finds it.
                    raise PostgresUnavailable("an import stored the same ids at this moment")
                await count_direct(connection, writing.taken)
        return outcomes

    async def _answer_known(self, batch: list[Operation]) -> None:
        """After a return to the stream, Redis does not know the ids that were stored before."""
        waiting = [operation for operation in batch if not operation.future.done()]
        if not waiting:
            return
        epochs = {operation.shard: self._member.states[operation.shard].epoch for operation in waiting}
        async with self._database.connection() as connection:
            lookup = _Lookup()
            await lookup.look(connection, waiting)
        for operation in waiting:
            outcome = lookup.known(operation)
            if outcome is not None:
                self._done(operation, outcome)
            else:
                operation.looked_up_in = epochs[operation.shard]


class _Lookup:
    """What Postgres knows of the ids of some operations."""

    def __init__(self) -> None:
        self.stored: dict[Identity, tuple[int, str | bytes | None]] = {}

    async def look(self, connection: Connection, operations: Sequence[Operation]) -> None:
        """Read what is stored under the operations' ids."""
        identities = {identity for operation in operations for identity in _identities(operation)}
        self.stored.update(await items.present(connection, list(identities)))

    def known(self, operation: Operation) -> Outcome | None:
        """The first receipts again, or a conflict; None if all ids are new."""
        found = [self.stored.get(identity) for identity in _identities(operation)]
        if not any(found):
            return None
        payloads = operation.arguments[3::4]
        clashing = [
            item_id
            for item_id, stored, payload in zip(operation.ids, found, payloads, strict=True)
            if stored and (stored[1] is None or not equal_as_json(payload, stored[1]))
        ]
        if clashing:
            return Conflict(f"known with another body: {', '.join(clashing)}", ids=clashing)
        if not all(found):
            return Conflict("a part of this batch is known already, under the same ids", ids=operation.ids)
        return [
            Receipt(item_id, stored[0], "stored", "direct", duplicate=True)
            for item_id, stored in zip(operation.ids, found, strict=True)
            if stored
        ]


class _Writing(_Lookup):
    """The decisions of one transaction, in the order of its operations."""

    def __init__(self, locked: dict[int, Locked], clean: dict[int, bool]) -> None:
        super().__init__()
        self._locked = locked
        self._clean = clean
        self._last: dict[tuple[str, str], int] = {}
        self.taken = dict.fromkeys(locked, 0)
        self.rows: list[Placed] = []

    async def look(self, connection: Connection, operations: Sequence[Operation]) -> None:
        """Read what decisions need: stored ids, and the last positions where one is expected."""
        await super().look(connection, operations)
        conversations = {_identities(op)[0][:2] for op in operations if op.expected is not None}
        if conversations:
            self._last = await last_positions(connection, list(conversations))

    def decide(self, operation: Operation) -> Outcome:
        """Its receipts, with rows to be written unless it is a repeat; or why it is rejected."""
        known = self.known(operation)
        if known is not None:
            return known
        identities = _identities(operation)
        conversation = identities[0][:2]
        if operation.expected is not None:
            if not self._clean[operation.shard]:
                return Unavailable("the last position may be unknown: a process is missing", retry_after=1.0)
            last = self._last.get(conversation, 0)
            if last != operation.expected:
                why = f"the last position is {last}, not {operation.expected}"
                return PreconditionFailed(why, last_position=last)
        if operation.kind == ERASE:
            self.stored = {k: v for k, v in self.stored.items() if k[:2] != conversation}
        row = self._locked[operation.shard]
        first = pack(row.epoch, row.next_direct + self.taken[operation.shard])
        self.taken[operation.shard] += len(identities)
        receipts = []
        for index, identity in enumerate(identities):
            header, data = operation.arguments[4 * index + 2], operation.arguments[4 * index + 3]
            self.rows.append(placed(first + index, header, data))
            if data:  # else it is no item
                self.stored[identity] = (first + index, data)
            receipts.append(Receipt(identity[2], first + index, "stored", "direct"))
        self._last[conversation] = 0 if operation.kind == ERASE else first + len(identities) - 1
        return receipts


def _identities(operation: Operation) -> list[Identity]:
    tenant, conversation = operation.conversation.decode().split("/")
    return [(tenant, conversation, item_id) for item_id in operation.ids]
