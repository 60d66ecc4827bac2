"""What happened in a conversation after a position: appended and deleted, flushed or not, in order.

The rules are those of `buffer.read.reader`. What was appended and is gone since is not told again; what made
it disappear is.
"""

from __future__ import annotations

from dataclasses import dataclass

from buffer.model.codec import decode_item
from buffer.model.record import DELETE, ERASE, ITEM, Record
from buffer.model.types import Event, Item
from buffer.policy.merge import removals, visible
from buffer.read.reader import Reader
from buffer.store.items import Where
from buffer.store.lookup import LookupStore, StoredEvent


@dataclass(slots=True, frozen=True)
class Part:
    """A part of a conversation's history, oldest first.

    ``through``: everything up to this position is told; ``more`` if a limit cut the rest off. Not ``whole``:
    what happened before may be with a process that is missing, so nothing is told.
    """

    events: list[Event]
    through: int
    more: bool = False
    whole: bool = True


class History:
    """Reads of what happened."""

    def __init__(self, reader: Reader, store: LookupStore) -> None:
        self._reader = reader
        self._store = store

    async def last_position(self, tenant: str, conversation: str) -> int:
        """The position of what happened last; 0 if nothing did.

        Raises:
            Unavailable: a store that is needed for the answer did not give it.
        """
        where = self._reader.where(tenant, conversation)

        async def look() -> int:
            tail = await self._reader.tail_of(where, enough=1)
            stored = await self._store.last(where)
            self._reader.check(where, tail, stored)
            return max([stored.position, *tail.records])

        return await self._reader.while_the_path_moves(where.shard, look)

    async def after(self, tenant: str, conversation: str, position: int, limit: int) -> Part:
        """The first ``limit`` events after a position.

        Raises:
            Unavailable: a store that is needed for the answer did not give it.
        """
        where = self._reader.where(tenant, conversation, after=position)
        return await self._reader.while_the_path_moves(where.shard, lambda: self._after(where, limit))

    async def _after(self, where: Where, limit: int) -> Part:
        tail = await self._reader.tail_of(where)
        erased = max((p for p, record in tail.records.items() if record.kind == ERASE), default=0)
        ids = [p.item_id for p in tail.pending if p.item_id is not None]
        stored = await self._store.history(where, limit, ids)
        self._reader.check(where, tail, stored)
        if not stored.clean:
            return Part([], where.after, whole=False)
        fresh = [p for p in tail.pending if p.item_id not in stored.known]
        removed = removals(fresh)
        events = [
            event
            for row in stored.events
            if row.position >= erased
            for event in _told(_from_store(row), gone=not visible(row.position, removed))
        ]
        if len(stored.events) >= limit:
            return Part(events, stored.events[-1].position, more=True)
        floor = max(stored.flushed_through, where.after, erased - 1)
        for pending in fresh:
            if pending.position > floor:
                event = event_of(pending.position, tail.records[pending.position])
                events += _told(event, gone=not visible(pending.position, removed))
        part = events[:limit]
        return Part(part, part[-1].position if part else where.after, more=len(events) > limit)


def _told(event: Event, *, gone: bool) -> list[Event]:
    """The event, if it is to be told: of an item that is gone only what it replaced."""
    if not gone or event.type == "deleted":
        return [event]
    if event.removed_after is None:
        return []
    return [Event("deleted", event.position, None, None, event.removed_after)]


def event_of(position: int, record: Record) -> Event:
    """What an entry of the stream tells."""
    if record.kind == DELETE:
        return Event("deleted", position, record.item_id)
    if record.kind == ERASE:
        return Event("deleted", position, None, None, 0)
    item = Item(decode_item(record.data), id=record.item_id, position=position, created_at=record.created_at)
    return Event("appended", position, record.item_id, item, record.cut)


def _from_store(row: StoredEvent) -> Event:
    if row.kind != ITEM:
        return Event(
            "deleted", row.position, row.item_id, None, 0 if row.kind == ERASE else row.removed_after
        )
    assert row.item_id is not None
    assert row.created_at is not None
    assert row.data is not None
    item = Item(decode_item(row.data), id=row.item_id, position=row.position, created_at=row.created_at)
    return Event("appended", row.position, row.item_id, item, row.removed_after)
