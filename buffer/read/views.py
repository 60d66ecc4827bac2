"""The newest items of a conversation, from its cached view and its tail: one round trip to Redis.

Where there is no view, Postgres is asked once and the view filled for all who come after: one read of this
process and of all others fills it, the rest wait for that. See `buffer.stream.views` for why a view is
never out of date.
"""

from __future__ import annotations

import asyncio
import logging
import os
import time
from collections.abc import Callable, Sequence

from buffer.errors import BufferError, RedisUnavailable
from buffer.metrics import Metrics, Tally
from buffer.model.codec import decode_item
from buffer.model.ids import conversation_key
from buffer.model.position import epoch_of, sequence_of
from buffer.model.record import Removal
from buffer.model.types import Item, Slice
from buffer.path.member import Member
from buffer.policy.merge import newest_page, removals, unflushed, visible
from buffer.read.reader import Reader, TailRead, from_tail, last_of, standing
from buffer.settings import Settings
from buffer.store.items import ItemReader, Snapshot, StoredItem, Where
from buffer.stream.link import LinkLost
from buffer.stream.shards import Refused
from buffer.stream.views import View, ViewItem, Views, encode

_log = logging.getLogger(__name__)

_AGAIN_SECONDS = 0.005
# For how long a read waits for the fill of another process, before it asks Postgres for itself.
_WAIT_SECONDS = 1.0


class ViewReader:
    """Reads of newest items of this process, by views where there are any."""

    def __init__(
        self,
        settings: Settings,
        reader: Reader,
        views: Views,
        member: Member,
        items: ItemReader,
        crowded: Callable[[], bool],
        metrics: Metrics,
    ) -> None:
        self._settings = settings
        self._reader = reader
        self._views = views
        self._member = member
        self._items = items
        self._crowded = crowded
        self._requests: Tally = metrics["cache_requests_total"]
        self._seconds: Tally = metrics["read_duration_seconds"]
        self._filling: dict[str, asyncio.Future[None]] = {}

    async def newest(self, tenant: str, conversation: str, limit: int, *, first: bool = False) -> Slice:
        """The newest ``limit`` items, oldest first, with the summary; and whether there are older ones.

        ``first``: the conversation's first item as well, if it is at hand.

        Raises:
            Unavailable: a store that is needed for the answer did not give it.
        """
        where = self._reader.where(tenant, conversation)
        return await self._reader.while_the_path_moves(where.shard, lambda: self._newest(where, limit, first))

    async def _newest(self, where: Where, limit: int, first: bool) -> Slice:
        began = time.perf_counter()
        state = await self._member.open(where.shard, self._settings.append_timeout_seconds)
        outcome, answer = "beyond", None
        if state.mode == "stream" and self._settings.view_max_bytes:
            outcome, answer = await self._by_view(where, state.epoch, limit, first, began + _WAIT_SECONDS)
        if answer is None:
            answer = await self._by_postgres(where, limit)
        tier = "postgres" if outcome in {"miss", "beyond"} else "redis"
        self._requests.inc(("conversation", tier, outcome), 1)
        self._seconds.observe(time.perf_counter() - began, ("view" if tier == "redis" else tier,))
        return answer

    async def _by_view(
        self,
        where: Where,
        epoch: int,
        limit: int,
        first: bool,
        deadline: float,
    ) -> tuple[str, Slice | None]:
        """How it went, and the answer, unless it takes more than the view has."""
        key = conversation_key(where.tenant, where.conversation)
        outcome, view_most = "hit", limit
        while True:
            tail, view = await self._reader.tail_and_view(where, epoch, limit + 1, view_most)
            if view is not None:
                answer = self._merged(where, tail, view, limit, first)
                if answer is not None:
                    return outcome, answer
                if not view.older:
                    return "beyond", None
                view_most = self._settings.view_max_bytes  # all of it
            elif (filling := self._filling.get(key)) is None:
                answer = await self._fill(where, key, tail, limit)
                if answer is not None:
                    return "miss", answer
                outcome = "shared"
                await asyncio.sleep(_AGAIN_SECONDS)
            elif outcome != "shared":
                outcome = "shared"
                await asyncio.wait([filling])
            else:
                await asyncio.sleep(_AGAIN_SECONDS)
            if time.perf_counter() > deadline:
                return "beyond", None

    def _merged(
        self,
        where: Where,
        tail: TailRead,
        view: View,
        limit: int,
        first: bool,
    ) -> Slice | None:
        """What view and tail say; None if that is not enough of the conversation."""
        known = {item.id for item in view.items} if tail.pending else set()
        pending = [p for p in tail.pending if p.item_id not in known]
        removed = removals(pending)
        older = view.items if tail.whole else []
        if removed:
            older = [item for item in older if visible(item.position, removed)]
        newer = unflushed(pending, 0)
        beyond = view.older or not view.whole or not tail.whole
        if beyond and len(older) + len(newer) < limit:
            return None
        self._reader.show(where, tail)
        page, more = newest_page(older, [from_tail(tail, p) for p in newer], limit)
        in_view = max(view.last, view.items[-1].position if view.items else 0)
        return Slice(
            page,
            more or beyond,
            True,
            last_of(tail, in_view, 0),
            standing(view.summary, removed),
            _still(view.first, removed) if first else None,
        )

    async def _fill(self, where: Where, key: str, tail: TailRead, limit: int) -> Slice | None:
        """Read Postgres and put the view in place; None if another process is at it."""
        claim = (where.shard, tail.epoch, key.encode(), os.urandom(8).hex().encode())
        claimed: bool | None = False
        done = self._filling[key] = asyncio.get_running_loop().create_future()
        try:
            claimed = await self._claim(*claim)
            if claimed is False:
                return None
            if not tail.whole:
                tail = await self._reader.tail_of(where)
            snapshot = await self._snapshot(where, tail, limit)
            if claimed:
                await self._put(*claim, snapshot)
        except BaseException:
            if claimed:
                self._views.give_back(*claim)
            raise
        finally:
            del self._filling[key]
            done.set_result(None)
        answer = self._answer(tail, snapshot, limit)
        return answer or await self._reader.newest_of(where, limit)

    async def _claim(self, shard: int, epoch: int, key: bytes, token: bytes) -> bool | None:
        """Whether this read may fill the view; None: nobody may, since Redis is full, or nearly."""
        if self._crowded():
            return None
        try:
            return await self._views.claim(shard, epoch, key, token)
        except (Refused, LinkLost):
            raise
        except RedisUnavailable as error:
            _log.debug("no view can be filled: %s", error)
            return None

    async def _by_postgres(self, where: Where, limit: int) -> Slice:
        tail = await self._reader.tail_of(where)
        answer = self._answer(tail, await self._snapshot(where, tail, limit), limit)
        return answer or await self._reader.newest_of(where, limit)

    async def _snapshot(self, where: Where, tail: TailRead, limit: int) -> Snapshot:
        """What Postgres has, as one picture that goes with the tail."""
        snapshot = await self._items.snapshot(
            where,
            limit + 1,
            self._settings.view_max_items,
            self._settings.view_max_bytes,
            [p.item_id for p in tail.pending if p.item_id is not None],
        )
        self._reader.check(where, tail, snapshot.slice)
        return snapshot

    async def _put(self, shard: int, epoch: int, key: bytes, token: bytes, snapshot: Snapshot) -> None:
        """A view that could not be put in place is missing, and nothing else."""
        stored = snapshot.slice
        if not stored.complete:  # until somebody has acted, Postgres is asked
            await self._views.drop(shard, epoch, [key])
            return
        flushed = sequence_of(stored.flushed_through) if epoch_of(stored.flushed_through) == epoch else -1
        view = _view_of(snapshot, self._settings.view_max_bytes, self._settings.view_max_items)
        try:
            await self._views.fill(shard, epoch, key, token, flushed, view)
        except Refused:
            raise
        except BufferError as error:
            _log.debug("view not filled: %s", error)

    def _answer(self, tail: TailRead, snapshot: Snapshot, limit: int) -> Slice | None:
        """What snapshot and tail say; None if the tail removes so much of it that more is needed."""
        stored = snapshot.slice
        pending = [
            p for p in tail.pending if p.position > stored.flushed_through and p.item_id not in stored.known
        ]
        removed = removals(pending)
        rows = [row for row in reversed(stored.items) if visible(row.position, removed)]
        newer = [from_tail(tail, p) for p in unflushed(pending, 0)]
        if snapshot.more and len(rows) + len(newer) < limit:
            return None
        page, more = newest_page([_from_row(row) for row in rows], newer, limit)
        first = _from_row(snapshot.first) if snapshot.first else None
        return Slice(
            page,
            more or snapshot.more,
            stored.complete,
            last_of(tail, stored.last_position, stored.flushed_through),
            standing(snapshot.slice.summary, removed),
            _still(first, removed),
        )


def _still(item: Item | None, removed: Sequence[Removal]) -> Item | None:
    return item if item is not None and visible(item.position, removed) else None


def _view_of(snapshot: Snapshot, most_bytes: int, most_items: int) -> bytes:
    """The view that a snapshot gives: the newest items that fit."""
    kept: list[bytes] = []
    nbytes = 0
    for row in snapshot.slice.items:  # newest first
        item = _encoded(row)
        nbytes += len(item)
        if len(kept) == most_items or nbytes > most_bytes:
            break
        kept.append(item)
    return encode(
        kept[::-1],
        whole=not snapshot.more and len(kept) == len(snapshot.slice.items),
        first=_encoded(snapshot.first) if snapshot.first else None,
        last=snapshot.slice.last_position or 0,
        summary=snapshot.slice.summary,
    )


def _encoded(row: StoredItem) -> bytes:
    return ViewItem(row.position, row.item_id, row.created_at, row.data.encode()).encode()


def _from_row(row: StoredItem) -> Item:
    return Item(decode_item(row.data), id=row.item_id, position=row.position, created_at=row.created_at)
