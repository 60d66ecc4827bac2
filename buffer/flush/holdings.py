"""Which shards a flusher holds, and where each stands.

Ownership is a lease in Postgres, renewed here; what it protects is protected by the fence, not by the
lease's clock. Shards that are more than a fair share are given back, missing ones are claimed.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable
from dataclasses import dataclass

import anyio

from buffer.errors import BufferError, RedisUnavailable
from buffer.metrics import Metrics
from buffer.model.position import epoch_of, sequence_of
from buffer.store.path_moves import PathMoves
from buffer.store.shards import Owned, ShardStore
from buffer.stream.shards import Backlog, Shards

_log = logging.getLogger(__name__)

# A shard that is held back for what it contains is looked at again after this.
_HELD_BACK_SECONDS = 5.0
_HAND_OVER_SECONDS = 5.0


@dataclass(slots=True)
class Cursor:
    """Where a held shard stands. Sequences of the shard's epoch; -1 is before the first."""

    owned: Owned
    committed: int  # Postgres has up to here
    fetched: int  # read from Redis up to here
    waiting_since: float | None = None
    held_back_until: float = 0.0
    backlog: Backlog | None = None

    @property
    def held_back(self) -> bool:
        """Whether the shard is left alone for now, because somebody has to act first."""
        return self.held_back_until > time.monotonic()

    def hold_back(self, why: str) -> None:
        """Leave the shard alone for a while; nothing of it is dropped."""
        self.held_back_until = time.monotonic() + _HELD_BACK_SECONDS
        _log.error("shard %d is held: %s", self.owned.shard, why)


class Holdings:
    """The shards of one flusher."""

    def __init__(
        self,
        flusher_id: str,
        lease_seconds: float,
        shards: Shards,
        store: ShardStore,
        paths: PathMoves,
        metrics: Metrics,
        cut_off: Callable[[], bool],
    ) -> None:
        self._id = flusher_id
        self._lease_seconds = lease_seconds
        self._shards = shards
        self._store = store
        self._paths = paths
        self._cut_off = cut_off
        self._metrics = metrics
        self._changing = asyncio.Lock()
        self._leaving = False
        self.held: list[int] = []
        self.cursors: dict[int, Cursor] = {}  # of those whose path is the stream

    async def keep(self, changed: asyncio.Event, task_status: anyio.abc.TaskStatus[None]) -> None:
        """Renew, claim and give back until cancelled; ``started`` once the first claim was tried."""
        started = False
        while True:
            try:
                async with self._changing:
                    await self._share()
            except BufferError as error:
                _log.warning("flusher %s cannot renew its leases: %s", self._id, error)
            changed.set()
            if not started:
                started = True
                task_status.started()
            await asyncio.sleep(self._lease_seconds / 3)

    async def resync(self) -> None:
        """After a failure: go on from where both stores say that they are."""
        async with self._changing:
            self.cursors.clear()
            await self._share()

    async def hand_over(self) -> None:
        """Give everything back; what cannot be given back is left to its lease."""
        with anyio.move_on_after(_HAND_OVER_SECONDS, shield=True):
            async with self._changing:
                self._leaving = True  # a share that is due now would claim them again
            try:
                await self._store.release(self._id, self.held)
                await self._store.leave(self._id)
            except BufferError as error:
                _log.warning("flusher %s leaves its shards to their leases: %s", self._id, error)
        for shard in sorted(self.cursors):
            self.drop(shard)
        self.held = []

    async def _share(self) -> None:
        if self._leaving:
            return
        if self._cut_off():  # others can flush
            await self._store.release(self._id, self.held)
            for shard in list(self.cursors):
                self.drop(shard)
            self.held = []
            return
        held, fair = await self._store.hold(self._id, self._lease_seconds, len(self._shards.keys))
        now = {owned.shard: owned for owned in held}
        for shard in set(self.cursors) - set(now):
            _log.info("flusher %s lost shard %d", self._id, shard)
            self.drop(shard)
        for shard, owned in now.items():
            known = self.cursors.get(shard)
            if known is None or (known.owned.fence, known.owned.path_epoch) != (
                owned.fence,
                owned.path_epoch,
            ):
                await self._adopt(owned)
        for shard in sorted(now)[fair:]:
            self.drop(shard)
            await self._store.release(self._id, [shard])
        self.held = sorted(now)[:fair]

    def drop(self, shard: int) -> None:
        """The shard is not ours any more."""
        self.cursors.pop(shard, None)
        self._metrics["shard_owned"].labels(shard=shard).set(0)

    async def _adopt(self, owned: Owned) -> None:
        """Find out where a shard stands in both stores, if its path is the stream."""
        if owned.mode != "stream":
            self.cursors.pop(owned.shard, None)
            return
        (backlog,) = await self._shards.peek([owned.shard])
        same_epoch = epoch_of(owned.flushed_through) == owned.path_epoch and owned.flushed_through > 0
        committed = sequence_of(owned.flushed_through) if same_epoch else -1
        cursor = Cursor(owned, max(committed, backlog.mark), backlog.mark)
        if backlog.epoch != owned.path_epoch:
            # The path's managers see the same, and either grant the epoch or close the path.
            raise RedisUnavailable(
                f"shard {owned.shard}: Redis has epoch {backlog.epoch}, not {owned.path_epoch}"
            )
        if backlog.mark > committed and (
            lost := await self._paths.went_back(owned.shard, owned.path_epoch, backlog.mark)
        ):
            _log.critical(
                "shard %d: Postgres was rolled back; positions %d to %d are lost", owned.shard, *lost
            )
        self.cursors[owned.shard] = cursor
        self._metrics["shard_owned"].labels(shard=owned.shard).set(1)
