"""Reads: the tail first, then Postgres, merged into one prefix.

The order matters: what is flushed between the two steps is seen in both, and `buffer.policy.merge`
tells which one counts. The other way round it could be seen in neither.

Postgres's answer names the path of the same snapshot: if it is not the one by which the read began, the
read is done again. While the path is direct, Postgres alone has everything.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from typing import Protocol, TypeVar

from buffer.errors import RedisUnavailable
from buffer.metrics import Metrics
from buffer.model.codec import decode_item
from buffer.model.ids import conversation_key, shard_of
from buffer.model.position import MAX_POSITION, pack
from buffer.model.record import ERASE, ITEM, Record, Removal, removal
from buffer.model.types import Item, Slice, Summary
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
from buffer.stream.shards import EntryMissing, RawEntry, Refused, Shards, Tail
from buffer.stream.views import View, Views

_T = TypeVar("_T")

# Tail entries that one round trip brings at the most: an item may have 1 MiB.
_TAIL_CHUNK = 100
_AGAIN_SECONDS = 0.02


@dataclass(slots=True)
class TailRead:
    """A conversation's unflushed records as one picture, oldest first, and what they mean for a merge."""

    epoch: int
    mode: str
    records: dict[int, Record] = field(default_factory=dict)
    pending: list[Pending] = field(default_factory=list)
    entries: list[RawEntry] = field(default_factory=list)
    whole: bool = False

    def add(self, chunk: Tail) -> None:
        """Put an older chunk before what is there."""
        older = [_pending(self.epoch, record) for record in chunk.records]
        self.records.update(zip((p.position for p in older), chunk.records, strict=True))
        self.pending = older + self.pending
        self.entries = chunk.entries + self.entries
        self.whole = chunk.older is None


class OnPath(Protocol):
    """What was read in Postgres, in the snapshot of its shard's path."""

    @property
    def epoch(self) -> int: ...  # noqa: D102
    @property
    def mode(self) -> str: ...  # noqa: D102
    @property
    def flushed_through(self) -> int: ...  # noqa: D102


class PathMoved(RedisUnavailable):
    """The path changed while a read was under way; it is done again."""


class Reader:
    """Reads of this process."""

    def __init__(
        self,
        shards: Shards,
        views: Views,
        member: Member,
        items: ItemReader,
        metrics: Metrics,
        timeout_seconds: float,
    ) -> None:
        self._shards = shards
        self._views = views
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
        where = self.where(tenant, conversation, after, before)
        return await self.while_the_path_moves(where.shard, lambda: self.newest_of(where, limit))

    async def oldest(
        self, tenant: str, conversation: str, limit: int, after: int = 0, before: int = MAX_POSITION
    ) -> Slice:
        """The oldest ``limit`` items between two positions, oldest first; and whether there are newer ones.

        Raises:
            Unavailable: a store that is needed for the answer did not give it.
        """
        where = self.where(tenant, conversation, after, before)
        return await self.while_the_path_moves(where.shard, lambda: self._oldest(where, limit))

    async def position_of(self, tenant: str, conversation: str, item_id: str) -> int | None:
        """Where an item stands, flushed or not; None if there is no such item."""
        where = self.where(tenant, conversation, 0, MAX_POSITION)

        async def find() -> int | None:
            tail = await self.tail_of(where, enough=None)
            ids = [item_id, *(p.item_id for p in tail.pending if p.item_id is not None)]
            stored = await self._items.positions(tenant, conversation, ids)
            if not self._member.may_show(where.shard, tail.epoch, tail.mode):
                raise PathMoved("the path has changed")
            fresh = [p for p in tail.pending if p.item_id not in stored]  # the rest are repeats, or flushed
            if item_id in stored:
                position, removed = stored[item_id]
            else:
                position, removed = next((p.position for p in fresh if p.item_id == item_id), 0), False
            return position if position and not removed and visible(position, removals(fresh)) else None

        return await self.while_the_path_moves(where.shard, find)

    def where(self, tenant: str, conversation: str, after: int = 0, before: int = MAX_POSITION) -> Where:
        """A part of a conversation, with its shard."""
        shard = shard_of(conversation_key(tenant, conversation), len(self._member.states))
        return Where(tenant, conversation, shard, after, before)

    async def newest_of(self, where: Where, limit: int) -> Slice:
        """The newest items of a part, from the tail and Postgres, by the path as it is now."""
        began = time.perf_counter()
        wanted = limit + 1  # one more tells whether there are more
        tail = await self.tail_of(where, enough=wanted)
        stored = await self._items.newest(where, wanted, tail.pending)
        if stored.known and not tail.whole:  # some of what seemed enough does not count
            tail = await self.tail_of(where, enough=None)
            stored = await self._items.newest(where, wanted, tail.pending)
        self.check(where, tail, stored)
        older = [_from_store(row) for row in reversed(stored.items)]
        newer = _new_in_tail(tail, stored, where)
        self._observe(tail, began)
        return Slice(
            *newest_page(older, newer, limit),
            stored.complete,
            last_of(tail, stored.last_position, stored.flushed_through),
            standing(stored.summary, _removed(tail, stored)),
        )

    async def _oldest(self, where: Where, limit: int) -> Slice:
        began = time.perf_counter()
        tail = await self.tail_of(where, enough=None)
        stored = await self._items.oldest(where, limit + 1, tail.pending)
        self.check(where, tail, stored)
        older = [_from_store(row) for row in stored.items]
        newer = _new_in_tail(tail, stored, where) if len(older) <= limit else []
        self._observe(tail, began)
        return Slice(
            *oldest_page(older, newer, limit),
            stored.complete,
            last_of(tail, stored.last_position, stored.flushed_through),
        )

    async def tail_of(self, where: Where, *, enough: int | None = None) -> TailRead:
        """The newest unflushed records until ``enough`` of them count, or all.

        Older chunks are read later than newer ones; what is flushed in between is in Postgres, which is
        read last. Removals act backwards, so the newest chunk must come first.
        """
        key = conversation_key(where.tenant, where.conversation)
        state = await self._member.open(where.shard, self._timeout_seconds)
        tail = TailRead(state.epoch, state.mode)
        if state.mode == "direct":
            tail.whole = True
            return tail
        older_from: int | None = None
        while True:
            chunk = await self._shards.tail(where.shard, state.epoch, key, _TAIL_CHUNK, older_from)
            tail.add(chunk)
            if tail.whole or (enough is not None and len(_counting(tail, where)) >= enough):
                return tail
            older_from = chunk.older

    async def tail_and_view(
        self, where: Where, epoch: int, enough: int, view_most: int
    ) -> tuple[TailRead, View | None]:
        """The view, and the unflushed records as of the same moment, until ``enough`` of them count."""
        key = conversation_key(where.tenant, where.conversation)
        tail = TailRead(epoch, "stream")
        chunk, view = await self._views.read(where.shard, epoch, key.encode(), _TAIL_CHUNK, view_most)
        mark = chunk.mark
        tail.add(chunk)
        while not tail.whole and len(_counting(tail, where)) < enough:
            chunk = await self._shards.tail(where.shard, epoch, key, _TAIL_CHUNK, chunk.older)
            if chunk.mark != mark:
                break  # some of it may have gone into the view meanwhile
            tail.add(chunk)
        return tail, view

    def check(self, where: Where, tail: TailRead, stored: OnPath) -> None:
        """The tail and the rows belong together, and what is shown from the tail stays with this process.

        Raises:
            PathMoved: they do not; read again.
        """
        if (stored.epoch, stored.mode) != (tail.epoch, tail.mode):
            raise PathMoved("the path has changed")
        self.show(where, tail, stored.flushed_through)

    def show(self, where: Where, tail: TailRead, flushed_through: int = -1) -> None:
        """What was read may be shown; what of it is not flushed is kept by this process until it is.

        Raises:
            PathMoved: it may not; read again.
        """
        if not self._member.may_show(where.shard, tail.epoch, tail.mode):
            raise PathMoved("the path has changed")
        if tail.entries:
            new = [
                entry
                for entry, pending in zip(tail.entries, tail.pending, strict=True)
                if pending.position > flushed_through
            ]
            self._member.retention.keep_entries(where.shard, tail.epoch, new)

    async def while_the_path_moves(self, shard: int, read: Callable[[], Awaitable[_T]]) -> _T:
        """What ``read`` gives, which is tried again for a while where the path gets in its way."""
        deadline = time.monotonic() + self._timeout_seconds
        while True:
            self._member.reach.refuse_if_alone(shard)
            epoch = self._member.states[shard].epoch
            try:
                return await read()
            except (Refused, LinkLost, EntryMissing, PathMoved) as error:
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

    def _observe(self, tail: TailRead, began: float) -> None:
        source = "merged" if tail.mode == "stream" else "postgres"
        self._metrics["read_duration_seconds"].observe(time.perf_counter() - began, (source,))


def _pending(epoch: int, record: Record) -> Pending:
    position = pack(epoch, record.sequence)
    item_id = record.item_id if record.kind == ITEM else None
    return Pending(position, item_id, removal(record.kind, record.cut, position))


def last_of(tail: TailRead, stored: int | None, flushed_through: int) -> int | None:
    """The conversation's last position, given the last of what is flushed; None where nothing is."""
    if not tail.records or max(tail.records) <= flushed_through:
        return stored or None
    last = max(tail.records)
    return None if tail.records[last].kind == ERASE else last


def _counting(tail: TailRead, where: Where) -> list[Pending]:
    """What of the tail alone belongs to the answer."""
    return between(unflushed(tail.pending, 0), where.after, where.before)


def _new_in_tail(tail: TailRead, stored: store_items.Slice, where: Where) -> list[Item]:
    """What the tail adds to what Postgres has."""
    new = new_in_tail(tail.pending, stored.flushed_through, stored.known)
    return [from_tail(tail, p) for p in between(new, where.after, where.before)]


def _removed(tail: TailRead, stored: store_items.Slice) -> list[Removal]:
    """What the tail removes from what Postgres has."""
    return removals(
        p for p in tail.pending if p.position > stored.flushed_through and p.item_id not in stored.known
    )


def standing(summary: Summary | None, removed: Sequence[Removal]) -> Summary | None:
    """The summary, unless something that it covers is being removed."""
    if summary is not None and any(removal.after < summary.through for removal in removed):
        return None
    return summary


def _from_store(row: StoredItem) -> Item:
    return Item(decode_item(row.data), id=row.item_id, position=row.position, created_at=row.created_at)


def from_tail(tail: TailRead, pending: Pending) -> Item:
    """An unflushed item."""
    record = tail.records[pending.position]
    return Item(
        decode_item(record.data), id=record.item_id, position=pending.position, created_at=record.created_at
    )
