"""The flusher: holds shards, watches their backlog, and moves it into Postgres.

One flush is fetch, commit, settle. Under load they overlap: while batch n is committed, batch n+1 is
fetched and batch n-1 is settled. Invariants:

* a shard's entries are committed in stream order, each exactly once: the flushed-through mark is written
  in the transaction of the rows, and a batch starts right after it;
* Redis forgets only what is committed;
* whatever fails, the next step is the same: read both stores' marks again and go on from there.
"""

from __future__ import annotations

import asyncio
import logging
import os
import socket
import time
from collections.abc import Callable, Container, Iterable
from functools import partial

import anyio

from buffer.errors import BufferError, PostgresUnavailable, Unavailable
from buffer.faults import armed, crash_point
from buffer.flush.batch import Batch, Entry, ShardBatch, decode
from buffer.flush.chores import Chores
from buffer.flush.holdings import Cursor, Holdings
from buffer.flush.writer import Fenced, Writer
from buffer.metrics import Metrics
from buffer.model.ids import uuid7_hex
from buffer.model.position import pack
from buffer.model.record import batch_continues
from buffer.path.manager import Manager
from buffer.policy.backoff import full_jitter
from buffer.policy.triggers import Triggers, fetch_count
from buffer.settings import Settings
from buffer.store.path_moves import PathMoves
from buffer.store.pool import Database
from buffer.store.shards import Owned, ShardStore
from buffer.stream.client import RedisClient
from buffer.stream.grants import Grants
from buffer.stream.shards import RawEntry, Shards, ViewLimits
from buffer.stream.views import Views

_log = logging.getLogger(__name__)

_FETCH_CHUNK = 1_000
_RETRY_FIRST_SECONDS = 0.05
_RETRY_MOST_SECONDS = 1.0
_LAST_FLUSH_SECONDS = 15.0


# Called after a commit, a shard at a time: the shard, the conversation key of each entry, those of which
# items were removed, and whether there is more to flush at once.
OnCommit = Callable[[Owned, Iterable[bytes], Container[bytes], bool], None]


def make_flusher_id() -> str:
    """A name for this flusher that a person can place."""
    return f"{socket.gethostname()[:20]}-{os.getpid()}-{uuid7_hex()[-8:]}"


class Flusher:
    """Flushes the shards that it holds, and shares them with other flushers."""

    def __init__(
        self,
        settings: Settings,
        client: RedisClient,
        shards: Shards,
        views: Views,
        database: Database,
        paths: PathMoves,
        make_grants: Callable[[Callable[[], str | None]], Grants],
        views_may_grow: Callable[[int], bool],
        metrics: Metrics,
        flusher_id: str,
        on_commit: OnCommit | None = None,
    ) -> None:
        self.id = flusher_id
        self._on_commit = on_commit
        self._settings = settings
        self._client = client
        self._shards = shards
        self._writer = Writer(database, flusher_id, settings.lease_seconds, metrics)
        self._metrics = metrics
        self._triggers = Triggers(
            settings.flush_max_turns, settings.flush_max_bytes, settings.flush_interval_seconds
        )
        self._tick_seconds = min(0.1, settings.flush_interval_seconds / 5)
        self._manager = Manager(settings, paths, make_grants, flusher_id, self._path_changed)
        self._holdings = Holdings(
            flusher_id,
            settings.lease_seconds,
            shards,
            ShardStore(database),
            paths,
            metrics,
            lambda: self._manager.cut_off,
        )
        self._nudged: set[int] = set()
        self._wakeup = asyncio.Event()
        self._stopping = asyncio.Event()
        self._chores = Chores(database, shards, views, lambda: not views_may_grow(0), metrics)
        self._view_limits = ViewLimits(
            int(settings.conversation_ttl_seconds * 1000) if settings.view_max_bytes else 0,
            settings.view_max_bytes,
            settings.view_max_items,
        )
        self._views_may_grow = views_may_grow
        self._failures = 0
        self._path_moved = False

    @property
    def held(self) -> list[int]:
        """The shards that this flusher holds."""
        return self._holdings.held

    def stop(self) -> None:
        """Ask for a last flush, hand the shards over, and return from `run`."""
        self._stopping.set()
        self._wakeup.set()

    async def run(self, *, task_status: anyio.abc.TaskStatus[None] = anyio.TASK_STATUS_IGNORED) -> None:
        """Flush until `stop`; ``started`` once the first claim was tried."""
        async with anyio.create_task_group() as tasks:
            await tasks.start(self._keep_shards)
            tasks.start_soon(self._manager.run)
            tasks.start_soon(self._chores.run)
            tasks.start_soon(self._listen)
            task_status.started()
            await self._flush_until_stopped()
            await self._holdings.hand_over()
            await self._manager.resign()
            tasks.cancel_scope.cancel()

    def _path_changed(self) -> None:
        """A shard was closed, or is open again: look which of ours are to be flushed."""
        self._path_moved = True
        self._wakeup.set()

    async def _keep_shards(self, *, task_status: anyio.abc.TaskStatus[None]) -> None:
        await self._holdings.keep(self._wakeup, task_status)

    async def _listen(self) -> None:
        nudge, _ = self._shards.channels
        while True:
            try:
                async for message in self._client.messages(nudge):
                    if message is not None:
                        self.nudge(int(message[1]))
            except BufferError as error:
                _log.debug("no nudges: %s", error)
            await asyncio.sleep(0.5)

    def nudge(self, shard: int) -> None:
        """Flush this shard without waiting for more."""
        self._nudged.add(shard)
        self._wakeup.set()

    # --- flushing

    async def _flush_until_stopped(self) -> None:
        while not self._stopping.is_set():
            await self._guarded(self._flush_what_is_due())
            with anyio.move_on_after(self._tick_seconds):
                await self._wakeup.wait()
            self._wakeup.clear()
        # The stop signal does not cancel the last flush; a bound does.
        with anyio.move_on_after(_LAST_FLUSH_SECONDS, shield=True):
            while not await self._guarded(self._flush_all_that_is_open()):
                pass

    async def _guarded(self, flush: object) -> bool:
        """Run one flush; on failure wait and resynchronize. Whether it succeeded."""
        try:
            await flush  # type: ignore[misc]
        except Fenced as error:
            self._metrics["fenced_flushes_total"].inc()
            _log.warning("flusher %s: %s; its flush was refused", self.id, error)
            for shard in error.shards:
                self._holdings.drop(shard)
        except BufferError as error:
            reason = "redis" if isinstance(error, Unavailable) else "refused"
            reason = "postgres" if isinstance(error, PostgresUnavailable) else reason
            self._metrics["flush_failures_total"].labels(reason=reason).inc()
            _log.warning("flush failed, will be tried again: %s", error)
        else:
            self._failures = 0
            return True
        self._failures += 1
        await asyncio.sleep(full_jitter(self._failures, _RETRY_FIRST_SECONDS, _RETRY_MOST_SECONDS))
        try:
            await self._holdings.resync()
        except BufferError as error:
            _log.debug("not synchronized yet: %s", error)
        return False

    async def _flush_what_is_due(self) -> None:
        await self._follow_path()
        await self._look()
        now = time.monotonic()
        nudged, self._nudged = self._nudged, set()
        for cursor in self._holdings.cursors.values():
            if cursor.backlog is None or cursor.held_back:
                continue
            waited = now - cursor.waiting_since if cursor.waiting_since is not None else 0.0
            nudge = cursor.owned.shard in nudged
            if self._triggers.due(cursor.backlog.turns, cursor.backlog.bytes, waited, nudged=nudge):
                crash_point("flush.before_read")
                await self._flush_everything()
                return

    async def _follow_path(self) -> None:
        if self._path_moved:
            self._path_moved = False
            try:
                await self._holdings.resync()
            except BufferError:
                self._path_moved = True
                raise

    async def _flush_all_that_is_open(self) -> None:
        await self._follow_path()
        await self._flush_everything()

    async def _flush_everything(self) -> None:
        """Flush what waits in the held shards, overlapping fetch, commit and settle."""
        settling: asyncio.Task[None] | None = None
        fetching: asyncio.Task[Batch] | None = None
        try:
            batch = await self._fetch()
            while batch.parts:
                fetching = asyncio.create_task(self._fetch()) if batch.full else None
                await self._commit(batch)
                if settling is not None:
                    await settling
                settling = asyncio.create_task(self._settle(batch))
                if fetching is None:
                    break
                batch = await fetching
            if settling is not None:
                await settling
        finally:
            for task in (settling, fetching):
                if task is not None and not task.done():
                    task.cancel()
                    await asyncio.gather(task, return_exceptions=True)

    async def _look(self) -> None:
        """Refresh every held shard's backlog and the gauges."""
        cursors = list(self._holdings.cursors.values())
        if not cursors:
            return
        backlogs = await self._shards.peek([c.owned.shard for c in cursors])
        now_ms, now = time.time() * 1000, time.monotonic()
        for cursor, backlog in zip(cursors, backlogs, strict=True):
            if backlog.epoch != cursor.owned.path_epoch and not cursor.held_back:
                raise Unavailable(f"shard {cursor.owned.shard}: Redis has epoch {backlog.epoch}")
            cursor.backlog = backlog
            if backlog.turns == 0 and backlog.bytes > 0:
                self._manager.lose(
                    cursor.owned.shard, cursor.owned.path_epoch, "unflushed entries are not in Redis any more"
                )
            if backlog.turns == 0:
                cursor.waiting_since = None
            elif cursor.waiting_since is None:
                cursor.waiting_since = now
            age = max(0.0, now_ms - backlog.oldest_ms) / 1000 if backlog.oldest_ms is not None else 0.0
            self._metrics["oldest_unflushed_age_seconds"].labels(shard=cursor.owned.shard).set(age)
            self._metrics["unflushed_turns"].labels(shard=cursor.owned.shard).set(backlog.turns)
        self._metrics["unflushed_bytes"].set(sum(b.bytes for b in backlogs))

    async def _fetch(self) -> Batch:
        await self._look()
        cursors = [
            c for c in self._holdings.cursors.values() if c.backlog and c.backlog.turns and not c.held_back
        ]
        waiting = {
            c.owned.shard: c.backlog.turns - (c.fetched - c.backlog.mark) for c in cursors if c.backlog
        }
        total = sum(max(0, n) for n in waiting.values())
        if total <= 0:
            return Batch([], full=False, fetched_at=time.monotonic())
        share = min(1.0, self._settings.flush_max_turns / total)
        parts = await asyncio.gather(
            *(
                self._fetch_shard(
                    c,
                    -int(-waiting[c.owned.shard] * share // 1),
                    self._settings.flush_max_bytes // len(cursors),
                )
                for c in cursors
                if waiting[c.owned.shard] > 0
            )
        )
        return Batch(
            [p for p in parts if p is not None],
            full=share < 1 or self._cut_short(cursors),
            fetched_at=time.monotonic(),
        )

    @staticmethod
    def _cut_short(cursors: list[Cursor]) -> bool:
        return any(c.backlog is not None and c.fetched - c.backlog.mark < c.backlog.turns for c in cursors)

    async def _fetch_shard(self, cursor: Cursor, turns: int, nbytes: int) -> ShardBatch | None:
        """Entries after the cursor, up to the limits, and on to the end of an append's batch."""
        assert cursor.backlog is not None
        owned, before = cursor.owned, cursor.fetched
        entries: list[RawEntry] = []
        at = before
        taken = 0
        while taken < nbytes and len(entries) < turns:
            count = fetch_count(
                turns - len(entries), nbytes - taken, cursor.backlog.turns, cursor.backlog.bytes
            )
            chunk = await self._shards.fetch(owned.shard, owned.path_epoch, at, min(count, _FETCH_CHUNK))
            if not chunk:
                break
            entries += chunk
            taken += sum(len(d) for _, _, d in chunk)
            at = int(chunk[-1][0].split(b"-")[1])
        while entries and batch_continues(entries[-1][1]):
            chunk = await self._shards.fetch(owned.shard, owned.path_epoch, at, 1)
            if not chunk:
                break
            entries += chunk
            at = int(chunk[-1][0].split(b"-")[1])
        if not entries:
            return None
        decoded, unknown = decode(entries)
        await self._look_for_holes(owned, before, decoded)
        if unknown is not None:
            self._metrics["flush_failures_total"].labels(reason="format").inc()
            cursor.hold_back(f"a newer release wrote to it: {unknown}")
        if not decoded:
            return None
        cursor.fetched = decoded[-1].sequence
        return ShardBatch(owned, before, cursor.committed, decoded)

    async def _look_for_holes(self, owned: Owned, before: int, entries: list[Entry]) -> None:
        """Numbers are dense: one that is not there was taken out of Redis by somebody else.

        Raises:
            Unavailable: nothing more of this shard is flushed. Its path closes, and whoever retains what is
                missing brings it.
        """
        if not entries or entries[-1].sequence == before + len(entries):
            return
        (backlog,) = await self._shards.peek([owned.shard])
        if backlog.epoch != owned.path_epoch or backlog.mark > before:
            raise Unavailable(f"shard {owned.shard}: another flusher went on from {before}")
        missing = entries[-1].sequence - before - len(entries)
        why = f"shard {owned.shard}: {missing} entries after number {before} are not in Redis any more"
        self._manager.lose(owned.shard, owned.path_epoch, why)
        raise Unavailable(why)

    async def _commit(self, batch: Batch) -> None:
        if batch.fresh:
            batch.written = await self._writer.write(batch)
            crash_point("flush.committed")
            self._metrics["flushed_turns_total"].inc(batch.fresh)
            self._metrics["flush_batch_turns"].observe(batch.fresh)
            self._metrics["flush_duration_seconds"].observe(time.monotonic() - batch.fetched_at)
            self._metrics["last_flush_success_timestamp_seconds"].set_to_current_time()
            if self._on_commit is not None:
                for part in batch.parts:
                    keys = [entry.conversation_key for entry in part.fresh()]
                    self._on_commit(part.owned, keys, part.changed(), batch.full)
        for part in batch.parts:
            cursor = self._holdings.cursors.get(part.owned.shard)
            if cursor is not None and cursor.owned.fence == part.owned.fence:
                cursor.committed = max(cursor.committed, part.through)

    async def _settle(self, batch: Batch) -> None:
        for part in batch.parts:
            steps = part.settlements(batch.written)
            views = self._view_limits
            if not self._views_may_grow(sum(step.view_bytes for step in steps)):
                views = views._replace(ttl_ms=0)
            settle = partial(self._shards.settle, part.owned.shard, part.owned.path_epoch, views=views)
            if armed == "flush.between_settles":
                await settle(steps[:1])
                crash_point("flush.between_settles")
            mark = await settle(steps)
            cursor = self._holdings.cursors.get(part.owned.shard)
            if cursor is not None:
                cursor.waiting_since = None
            if mark < part.through:
                raise Unavailable(
                    f"shard {part.owned.shard}: Redis went back to {pack(part.owned.path_epoch, mark)}"
                )
            await self._shards.rotate(
                part.owned.shard, part.owned.path_epoch, self._settings.idempotency_window_seconds
            )
