"""Reads: the tail first, then Postgres, merged into one prefix.

The order matters: what is flushed between the two steps is seen in both, and `buffer.policy.merge`
tells which one counts. The other way round it could be seen in neither.

Postgres's answer names the path of the same snapshot: if it is not the one by which the read began, the
read is done again. While the path is direct, Postgres alone has everything.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import TypeVar

from buffer.errors import RedisUnavailable
from buffer.metrics import Metrics
from buffer.model.codec import decode_item
from buffer.model.ids import conversation_key, shard_of
from buffer.model.position import MAX_POSITION, pack
from buffer.model.record import ERASE, ITEM, Record, removal
from buffer.model.types import Item, Slice
from buffer.path.member import Member
from buffer.policy.merge import (
    Pending,
    between,
    new_in_tail,
    newest_page,
    oldest_page,
    removals,
    unflushed,
    visible,
)
from buffer.store import items as store_items
from buffer.store.items import ItemReader, StoredItem, Where
from buffer.stream.link import LinkLost
from buffer.stream.shards import EntryMissing, RawEntry, Refused, Shards

_T = TypeVar("_T")

# Tail entries that one round trip brings at the most: an item may have 1 MiB.
_TAIL_CHUNK = 100
_AGAIN_SECONDS = 0.02


@dataclass(slots=True)
class _Tail:
    """A conversation's unflushed records as one picture, and what they mean for a merge."""

    epoch: int
    mode: str
    records: dict[int, Record]
    pending: list[Pending]
    entries: list[RawEntry]
    whole: bool = False


class _PathMoved(RedisUnavailable):
    """The path changed while a read was under way; it is done again."""


class Reader:
    """Reads of this process."""

    def __init__(
        self, shards: Shards, member: Member, items: ItemReader, metrics: Metrics, timeout_seconds: float
    ) -> None:
        self._shards = shards
        self._member = member
        self._items = items
        self._metrics = metrics
        self._timeout_seconds = timeout_seconds

    async def newest(
        self, tenant: str, conversation: str, limit: int, after: int = 0, before: int = MAX_POSITION
    ) -> Slice:
        """The newest ``limit`` items between two positions, oldest first; and whether there are older ones.

        Raises:
            Unavailable: a store that is needed for the answer did not give it.
        """
        where = self._where(tenant, conversation, after, before)
        return await self._while_the_path_moves(where.shard, lambda: self._newest(where, limit))

    async def oldest(
        self, tenant: str, conversation: str, limit: int, after: int = 0, before: int = MAX_POSITION
    ) -> Slice:
        """The oldest ``limit`` items between two positions, oldest first; and whether there are newer ones.

        Raises:
            Unavailable: a store that is needed for the answer did not give it.
        """
        where = self._where(tenant, conversation, after, before)
        return await self._while_the_path_moves(where.shard, lambda: self._oldest(where, limit))

    async def position_of(self, tenant: str, conversation: str, item_id: str) -> int | None:
        """Where an item stands, flushed or not; None if there is no such item."""
        where = self._where(tenant, conversation, 0, MAX_POSITION)

        async def find() -> int | None:
            tail = await self._tail(where, enough=None)
            ids = [item_id, *(p.item_id for p in tail.pending if p.item_id is not None)]
            stored = await self._items.positions(tenant, conversation, ids)
            if not self._member.may_show(where.shard, tail.epoch, tail.mode):
                raise _PathMoved("the path has changed")
            fresh = [p for p in tail.pending if p.item_id not in stored]  # the rest are repeats, or flushed
            if item_id in stored:
                position, removed = stored[item_id]
            else:
                position, removed = next((p.position for p in fresh if p.item_id == item_id), 0), False
            return position if position and not removed and visible(position, removals(fresh)) else None

        return await self._while_the_path_moves(where.shard, find)

    def _where(self, tenant: str, conversation: str, after: int, before: int) -> Where:
        shard = shard_of(conversation_key(tenant, conversation), len(self._member.states))
        return Where(tenant, conversation, shard, after, before)

    async def _newest(self, where: Where, limit: int) -> Slice:
        began = time.perf_counter()
        wanted = limit + 1  # one more tells whether there are more
        tail = await self._tail(where, enough=wanted)
        stored = await self._items.newest(where, wanted, tail.pending)
        if stored.known and not tail.whole:  # some of what seemed enough does not count
            tail = await self._tail(where, enough=None)
            stored = await self._items.newest(where, wanted, tail.pending)
        self._check_path(where, tail, stored)
        older = [_from_store(row) for row in reversed(stored.items)]
        newer = _new_in_tail(tail, stored, where)
        self._observe(tail, began)
        return Slice(*newest_page(older, newer, limit), stored.complete, _last_position(tail, stored))

    async def _oldest(self, where: Where, limit: int) -> Slice:
        began = time.perf_counter()
        tail = await self._tail(where, enough=None)
        stored = await self._items.oldest(where, limit + 1, tail.pending)
        self._check_path(where, tail, stored)
        older = [_from_store(row) for row in stored.items]
        newer = _new_in_tail(tail, stored, where) if len(older) <= limit else []
        self._observe(tail, began)
        return Slice(*oldest_page(older, newer, limit), stored.complete, _last_position(tail, stored))

    async def _tail(self, where: Where, *, enough: int | None) -> _Tail:
        """The newest unflushed records until ``enough`` of them count, or all.

        Older chunks are read later than newer ones; what is flushed in between is in Postgres, which is
        read last. Removals act backwards, so the newest chunk must come first.
        """
        key = conversation_key(where.tenant, where.conversation)
        state = await self._member.open(where.shard, self._timeout_seconds)
        epoch = state.epoch
        tail = _Tail(epoch, state.mode, {}, [], [])
        if state.mode == "direct":
            tail.whole = True
            return tail
        older_from: int | None = None
        while True:
            chunk = await self._shards.tail(where.shard, epoch, key, _TAIL_CHUNK, older_from)
            older = [_pending(epoch, record) for record in chunk.records]
            tail.records.update(zip((p.position for p in older), chunk.records, strict=True))
            tail.pending = older + tail.pending
            tail.entries = chunk.entries + tail.entries
            if chunk.older is None:
                tail.whole = True
                return tail
            if enough is not None and len(_counting(tail, where)) >= enough:
                return tail
            older_from = chunk.older

    def _check_path(self, where: Where, tail: _Tail, stored: store_items.Slice) -> None:
        """The tail and the rows belong together, and what is shown from the tail stays with this process.

        Raises:
            _PathMoved: they do not; read again.
        """
        same = (stored.epoch, stored.mode) == (tail.epoch, tail.mode)
        if not same or not self._member.may_show(where.shard, tail.epoch, tail.mode):
            raise _PathMoved("the path has changed")
        if tail.entries:
            new = [
                e
                for e, p in zip(tail.entries, tail.pending, strict=True)
                if p.position > stored.flushed_through
            ]
            self._member.retention.keep_entries(where.shard, tail.epoch, new)

    async def _while_the_path_moves(self, shard: int, read: Callable[[], Awaitable[_T]]) -> _T:
        deadline = time.monotonic() + self._timeout_seconds
        while True:
            self._member.reach.refuse_if_alone(shard)
            epoch = self._member.states[shard].epoch
            try:
                return await read()
            except (Refused, LinkLost, EntryMissing, _PathMoved) as error:
                if time.monotonic() > deadline:
                    raise
                if isinstance(error, Refused):
                    self._member.refused(shard, epoch)
                elif isinstance(error, EntryMissing):
                    await self._member.lose(shard, epoch, str(error))
                elif isinstance(error, LinkLost):
                    self._member.reach.lost()
                self._member.suspect()
                await asyncio.sleep(_AGAIN_SECONDS)

    def _observe(self, tail: _Tail, began: float) -> None:
        source = "merged" if tail.mode == "stream" else "postgres"
        self._metrics["read_duration_seconds"].labels(source=source).observe(time.perf_counter() - began)


def _pending(epoch: int, record: Record) -> Pending:
    position = pack(epoch, record.sequence)
    item_id = record.item_id if record.kind == ITEM else None
    return Pending(position, item_id, removal(record.kind, record.cut, position))


def _last_position(tail: _Tail, stored: store_items.Slice) -> int | None:
    """Of what came last, removed items and removals included; None where nothing is, or all was erased."""
    if not tail.records or max(tail.records) <= stored.flushed_through:
        return stored.last_position
    last = max(tail.records)
    return None if tail.records[last].kind == ERASE else last


def _counting(tail: _Tail, where: Where) -> list[Pending]:
    """What of the tail alone belongs to the answer."""
    return between(unflushed(tail.pending, 0), where.after, where.before)


def _new_in_tail(tail: _Tail, stored: store_items.Slice, where: Where) -> list[Item]:
    """What the tail adds to what Postgres has."""
    new = new_in_tail(tail.pending, stored.flushed_through, stored.known)
    return [_from_tail(tail, p) for p in between(new, where.after, where.before)]


def _from_store(row: StoredItem) -> Item:
    return Item(decode_item(row.data), id=row.item_id, position=row.position, created_at=row.created_at)


def _from_tail(tail: _Tail, pending: Pending) -> Item:
    record = tail.records[pending.position]
    return Item(
        decode_item(record.data), id=record.item_id, position=pending.position, created_at=record.created_at
    )
