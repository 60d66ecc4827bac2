"""Single items and positions, and whether a conversation is there; flushed or not.

Read as `buffer.read.reader` reads: the tail first, then Postgres, whose answer names the path of the same
snapshot; what is shown from the tail is retained by this process.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import TypeVar

from buffer.errors import NotFound, Unavailable
from buffer.model.codec import decode_item
from buffer.model.record import ERASE, ITEM, Record
from buffer.model.types import Item
from buffer.policy.merge import new_in_tail, removals, visible
from buffer.read.reader import PathMoved, Reader, from_tail
from buffer.store.conversations import Outdated, Unflushed
from buffer.store.items import Where
from buffer.store.lookup import LookupStore

_T = TypeVar("_T")


class Lookup:
    """Look-ups of this process."""

    def __init__(self, reader: Reader, store: LookupStore) -> None:
        self._reader = reader
        self._store = store

    async def item(self, tenant: str, conversation: str, item_id: str) -> Item:
        """One item.

        Raises:
            NotFound: there is none of that id, or it was removed.
            Unavailable: a store that is needed for the answer did not give it.
        """
        where = self._reader.where(tenant, conversation)
        item = await self._reader.while_the_path_moves(where.shard, lambda: self._item(where, item_id))
        if item is None:
            raise NotFound(f"conversation {conversation!r} has no item {item_id!r}")
        return item

    async def _item(self, where: Where, item_id: str) -> Item | None:
        tail = await self._reader.tail_of(where)
        ids = [p.item_id for p in tail.pending if p.item_id is not None]
        stored = await self._store.item(where, item_id, ids)
        self._reader.check(where, tail, stored)
        removed = removals(p for p in tail.pending if p.item_id not in stored.known)
        row = stored.item
        if row is not None and visible(row.position, removed):
            data = decode_item(row.data)
            return Item(data, id=row.item_id, position=row.position, created_at=row.created_at)
        for pending in new_in_tail(tail.pending, stored.flushed_through, stored.known):
            if pending.item_id == item_id:
                return from_tail(tail, pending)
        if not stored.complete and item_id not in stored.known:
            raise Unavailable("a part of the conversation cannot be reached", retry_after=1.0)
        return None

    async def beside_the_tail(
        self, tenant: str, conversation: str, use: Callable[[Unflushed], Awaitable[_T]]
    ) -> _T:
        """What ``use`` makes of the unflushed items of a conversation; done again while it says `Outdated`.

        Raises:
            Unavailable: a store that is needed for the answer did not give it.
        """
        where = self._reader.where(tenant, conversation)

        async def look() -> _T:
            tail = await self._reader.tail_of(where)
            self._reader.show(where, tail)
            try:
                return await use(_unflushed(where.shard, tail.epoch, tail.mode, tail.records))
            except Outdated as error:
                raise PathMoved(str(error)) from error

        return await self._reader.while_the_path_moves(where.shard, look)


def _unflushed(shard: int, epoch: int, mode: str, records: dict[int, Record]) -> Unflushed:
    """The items since the last erasure; what was deleted among them counts, as it does for a flush."""
    erased = max((position for position, r in records.items() if r.kind == ERASE), default=-1)
    items = sorted((p, r) for p, r in records.items() if p > erased and r.kind == ITEM)
    if not items:
        return Unflushed(shard, epoch, mode, 0, None, None, None)
    last, newest = items[-1]
    user = next((record.user for _, record in items if record.user is not None), None)
    return Unflushed(shard, epoch, mode, last, user, items[0][1].created_at, newest.created_at)
