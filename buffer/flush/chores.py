"""What a flusher does now and then beside flushing: the ledger's gauges, and views that must go."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable

import anyio

from buffer.errors import BufferError, Unavailable
from buffer.metrics import Metrics
from buffer.model.ids import conversation_key, shard_of
from buffer.model.position import epoch_of, sequence_of
from buffer.store import stale_views
from buffer.store.ledger import LossLedger
from buffer.store.pool import Database
from buffer.store.stale_views import Streaming
from buffer.stream.shards import Shards
from buffer.stream.views import Views

_log = logging.getLogger(__name__)

_LEDGER_SECONDS = 2.0
_STALE_VIEWS_SECONDS = 0.5
_SETTLED_SECONDS = 1.0
_AGAIN_SECONDS = 0.01
# 10,000 keys a second, a few ms of Redis's time each: more than readers put there, less than they miss.
_SWEEP_SECONDS = 0.1
_SWEEP_KEYS = 500
_SWEEPS = 2


class Chores:
    """The chores of one flusher; with several, each does what it finds."""

    def __init__(
        self,
        database: Database,
        shards: Shards,
        views: Views,
        crowded: Callable[[], bool],
        metrics: Metrics,
    ) -> None:
        self._database = database
        self._shards = shards
        self._ledger = LossLedger(database)
        self._views = views
        self._crowded = crowded
        self._metrics = metrics

    async def run(self) -> None:
        """Go on until cancelled; what fails is tried again."""
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(self._tell_losses)
            tasks.start_soon(self._drop_stale_views)
            tasks.start_soon(self._sweep_views)

    async def _tell_losses(self) -> None:
        while True:
            try:
                totals = await self._ledger.totals()
            except BufferError as error:
                _log.debug("the ledger cannot be read: %s", error)
            else:
                self._metrics["lost_turns_total"].set_total((), totals.lost_turns)
                changes = self._metrics["incarnation_changes_total"]
                changes.set_total(("redis",), totals.redis_incarnations)
                changes.set_total(("postgres",), totals.postgres_incarnations)
                self._metrics["dead_letter_turns"].set(totals.dead_letters)
                self._metrics["missing_processes"].set(totals.missing)
            await asyncio.sleep(_LEDGER_SECONDS)

    async def _sweep_views(self) -> None:
        """While Redis is nearly full, drop views, whichever come first."""
        cursor = 0
        while True:
            await asyncio.sleep(_SWEEP_SECONDS)
            for _ in range(_SWEEPS if self._crowded() else 0):
                try:
                    cursor, swept = await self._views.sweep(cursor, _SWEEP_KEYS)
                except BufferError as error:
                    _log.debug("views are not swept: %s", error)
                else:
                    self._metrics["swept_views_total"].inc(swept)

    async def _drop_stale_views(self) -> None:
        while True:
            dropped = 0
            try:
                dropped = await self._drop_some()
            except BufferError as error:
                _log.debug("stale views are not dropped yet: %s", error)
            if not dropped:
                await asyncio.sleep(_STALE_VIEWS_SECONDS)

    async def _drop_some(self) -> int:
        async with stale_views.taken(self._database) as (pairs, paths):
            by_shard: dict[int, list[bytes]] = {}
            for pair in pairs:
                key = conversation_key(*pair)
                by_shard.setdefault(shard_of(key, len(paths)), []).append(key.encode())
            for shard, keys in by_shard.items():
                if (path := paths[shard]) is not None:
                    await self._settled(shard, path)
                    await self._views.drop(shard, path.epoch, keys)
        return len(pairs)

    async def _settled(self, shard: int, path: Streaming) -> None:
        """Return once Redis has been told of all that was committed before: it may begin a view yet.

        Raises:
            Unavailable: it has not been for long.
        """
        through = path.flushed_through
        wanted = sequence_of(through) if epoch_of(through) == path.epoch else -1
        deadline = time.monotonic() + _SETTLED_SECONDS
        while True:
            ((epoch, mark),) = await self._shards.marks([shard])
            if epoch != path.epoch or mark >= wanted:
                return
            if time.monotonic() > deadline:
                raise Unavailable(f"shard {shard}: {wanted} is committed, Redis knows of {mark}")
            await asyncio.sleep(_AGAIN_SECONDS)
