"""An accepting process's side of the path protocol; see the package for its states and rules.

It says that it lives, follows the path row of every shard, spills what it retains when a path closes, and
knows at every moment whether an answer from Redis may count as an ack.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable
from typing import Literal

import anyio

from buffer.errors import BufferError, RedisUnavailable, Unavailable
from buffer.metrics import Metrics
from buffer.path.reach import Reach
from buffer.path.retention import Retention
from buffer.settings import Settings
from buffer.store.paths import Mode, PathRow, PathStore
from buffer.stream.link import LinkLost
from buffer.stream.marks import Marks
from buffer.stream.shards import Refused, Shards

_log = logging.getLogger(__name__)

# Shares of the heartbeat time-out. A confirmed heartbeat permits acks for so long; the rest of the time-out
# is for the ack's own way. A manager's word that it is without Postgres permits them for a shorter time.
_PERMIT = 0.6
_PERMIT_BY_REPORT = 0.3
_BEAT = 0.1
_BEAT_LIMIT = 0.3

_SUSPICIOUS_SECONDS = 2.0
_SOON_SECONDS = 0.03
_DIRECT_SECONDS = 0.15
_MARKS_SECONDS = 1.0
_ASK_SECONDS = 0.1
_LAST_FLUSH_MOST_SECONDS = 2.0


class State:
    """One shard's path, as this process follows it. ``joining``: it takes no part for now."""

    __slots__ = ("clean", "epoch", "ids_known_at", "mode")

    def __init__(self) -> None:
        self.epoch = 0
        self.mode: Mode | Literal["joining"] = "joining"
        self.clean = False
        self.ids_known_at = 0.0  # by this process's clock; before it, Redis does not know every id

    def at(self, epoch: int, mode: str) -> bool:
        """Whether this is still that epoch and mode."""
        return self.epoch == epoch and self.mode == mode


class Member:
    """This process, as the path protocol knows it. One that does not accept only follows."""

    def __init__(
        self,
        settings: Settings,
        store: PathStore,
        shards: Shards,
        marks: Marks,
        metrics: Metrics,
        process: str,
        *,
        accepting: bool,
    ) -> None:
        self.process = process
        self.field = shards.member
        self.states = [State() for _ in shards.keys]
        self.retention = Retention(len(shards.keys))
        self.reach = Reach(self.states, settings.redis_lost_seconds)
        self.run_id: str | None = None
        self.on_change: list[Callable[[], None]] = []
        self._settings = settings
        self._store = store
        self._shards = shards
        self._marks = marks
        self._metrics = metrics
        self._accepting = accepting
        self._timeout_seconds = settings.heartbeat_timeout_seconds
        self._permitted_until = 0.0
        self._questions: dict[int, float] = {}  # number to when it was asked
        self._changed = asyncio.Event()
        self._suspected = asyncio.Event()
        self._suspicious_until = 0.0
        self._refreshing: asyncio.Task[None] | None = None
        self._leaving = False
        marks.on_mark = self.retention.release

    # --- what the append and read paths ask

    def permitted(self) -> bool:
        """Whether nobody can have judged this process dead."""
        return time.monotonic() <= self._permitted_until

    def may_ack(self, shard: int, epoch: int) -> bool:
        """Whether an answer of Redis to a call of that epoch counts."""
        state = self.states[shard]
        return state.epoch == epoch and state.mode == "stream" and time.monotonic() <= self._permitted_until

    def may_show(self, shard: int, epoch: int, mode: str) -> bool:
        """Whether what was read in that epoch and mode may be shown."""
        return self.states[shard].at(epoch, mode) and (mode == "direct" or self.permitted())

    async def open(self, shard: int, within_seconds: float) -> State:
        """The shard's state, once it is open for appends and reads.

        Raises:
            Unavailable: not within the time.
        """
        deadline = time.monotonic() + within_seconds
        while True:
            if self._leaving:
                raise RedisUnavailable("this process is closing")
            state = self.states[shard]
            follows = not self._accepting  # it acks and shows nothing, and needs no permit
            if state.mode == "direct" or (state.mode == "stream" and (follows or self.permitted())):
                return state
            left = deadline - time.monotonic()
            if left <= 0:
                raise Unavailable(self.trouble(shard), retry_after=0.5)
            self.suspect()
            with anyio.move_on_after(min(left, 0.05)):
                await self._changed.wait()

    def trouble(self, shard: int) -> str:
        """Why the shard is not open."""
        state = self.states[shard]
        if state.mode == "stream":
            return "this process has lost touch with Postgres, or its path managers have; it acks nothing"
        if state.mode == "closing":
            return "the service switches from Redis to Postgres"
        return "this process is not part of the service at this moment; it joins again by itself"

    def suspect(self) -> None:
        """Something was refused or lost: look at the path now, and often for a while."""
        self._suspicious_until = time.monotonic() + _SUSPICIOUS_SECONDS
        self._suspected.set()

    async def lose(self, shard: int, epoch: int, why: str) -> None:
        """Redis does not hold what it should of this epoch: close its path, so that the copies are brought.

        Raises:
            PostgresUnavailable: not now.
        """
        await self._store.close(self.process, {shard: epoch}, why)
        self.suspect()

    def refused(self, shard: int, epoch: int) -> None:
        """A script refused this process in that epoch: it takes no part until it has joined again."""
        state = self.states[shard]
        if state.at(epoch, "stream"):
            state.mode = "joining"
            self._announce()
        self.suspect()

    # --- following

    async def run(self) -> None:
        """Follow the path and the marks until cancelled."""
        try:
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(self._follow_path, name="path-follow")
                if self._accepting:
                    tasks.start_soon(self._follow_redis, name="path-marks")
        finally:
            if self._refreshing is not None:
                self._refreshing.cancel()
                await asyncio.gather(self._refreshing, return_exceptions=True)

    async def _follow_path(self) -> None:
        while True:
            try:
                await self.refresh()
            except (BufferError, TimeoutError) as error:
                _log.debug("path not seen: %s", error or "time-out")
            self._suspected.clear()
            with anyio.move_on_after(self._pause_seconds()):
                await self._suspected.wait()
            if self._suspected.is_set():
                await asyncio.sleep(_SOON_SECONDS)

    def _pause_seconds(self) -> float:
        modes = {state.mode for state in self.states}
        if modes & {"closing", "joining"} or time.monotonic() < self._suspicious_until:
            return _SOON_SECONDS
        return _DIRECT_SECONDS if "direct" in modes else _BEAT * self._timeout_seconds

    async def refresh(self) -> None:
        """Look at the path once; concurrent callers share one look.

        Raises:
            PostgresUnavailable, TimeoutError: Postgres did not answer; what was known stays.
        """
        if self._refreshing is None or self._refreshing.done():
            self._refreshing = asyncio.create_task(self._refresh(), name="path-refresh")
        await asyncio.shield(self._refreshing)

    async def _refresh(self) -> None:
        sent = time.monotonic()
        async with asyncio.timeout(_BEAT_LIMIT * self._timeout_seconds):
            rows, confirmed = await self._store.heartbeat(
                self.process if self._accepting else "", self._settings.idempotency_window_seconds
            )
        self._look_at_run_ids(rows)
        if not self._accepting:
            for row in rows:
                self._enter(row)
        elif not self._leaving:
            if any(epoch is not None for epoch in confirmed or ()):
                self._permitted_until = max(self._permitted_until, sent + _PERMIT * self._timeout_seconds)
            await self._follow(rows, confirmed)

    async def _follow(self, rows: list[PathRow], confirmed: list[int | None] | None) -> None:
        """Do what the rows ask for, given the last epochs that this process has confirmed."""
        to_register: list[PathRow] = []
        to_confirm: list[PathRow] = []
        to_join: list[PathRow] = []
        for row in rows:
            state = self.states[row.shard]
            known = confirmed[row.shard] if confirmed else None
            if row.epoch < state.epoch:
                self._older_postgres(row, state)
            elif known is None:
                to_register.append(row)
            elif row.mode == "closing":
                if known < row.epoch:
                    to_confirm.append(row)
            elif row.mode == "stream" and not state.at(row.epoch, "stream"):
                to_join.append(row)
            else:
                self._enter(row)
        if to_register:
            await self._register(to_register)
        if to_confirm:
            await self._confirm(to_confirm)
        if to_join:
            await self._join(to_join)

    def _look_at_run_ids(self, rows: list[PathRow]) -> None:
        """Calls go to the server that the newest stream epoch was granted to."""
        streams = [row for row in rows if row.mode == "stream"]
        if streams:
            self.run_id = max(streams, key=lambda row: row.epoch).run_id

    def _older_postgres(self, row: PathRow, state: State) -> None:
        _log.critical(
            "shard %d: Postgres says epoch %d, and said %d before: it was restored or rolled back",
            row.shard,
            row.epoch,
            state.epoch,
        )
        state.mode = "joining"
        self._announce()

    async def _register(self, rows: list[PathRow]) -> None:
        for row in rows:
            self.states[row.shard].mode = "joining"
        self._announce()
        older = {row.shard: self.retention.older(row.shard, row.epoch) for row in rows}
        registered = await self._store.register(
            self.process, {row.shard: row for row in rows}, older, len(self.states)
        )
        for row in rows:
            if row.shard in registered:
                self.retention.drop_older(row.shard, row.epoch)
        self._suspected.set()  # the next look lets it join

    async def _confirm(self, rows: list[PathRow]) -> None:
        """From here on no answer of an older epoch is an ack: so what is retained is all there is."""
        for row in rows:
            state = self.states[row.shard]
            state.epoch, state.mode = row.epoch, "closing"
        self._announce()
        spill = {row.shard: self.retention.older(row.shard, row.epoch) for row in rows}
        began = time.monotonic()
        spilled = await self._store.confirm(self.process, {row.shard: row.epoch for row in rows}, spill)
        if new := sum(spilled.values()):
            self._metrics["spilled_turns_total"].inc(new)
        turns = sum(map(len, spill.values()))
        _log.warning(
            "the path of shards %s closes: %d retained items in Postgres, %d of them new, in %.3f s",
            sorted(spilled),
            turns,
            new,
            time.monotonic() - began,
        )
        self._suspected.set()

    async def _join(self, rows: list[PathRow]) -> None:
        for row in rows:
            self.states[row.shard].mode = "joining"
        self._announce()
        await self._shards.join({row.shard: row.epoch for row in rows})
        for row in rows:
            self._enter(row)

    def _enter(self, row: PathRow) -> None:
        state = self.states[row.shard]
        if row.epoch < state.epoch or (state.at(row.epoch, row.mode) and state.clean == row.clean):
            return
        state.epoch, state.mode, state.clean = row.epoch, row.mode, row.clean
        state.ids_known_at = time.monotonic() + row.ids_unknown_seconds if row.ids_unknown_seconds else 0.0
        if row.mode != "closing":
            self.retention.drop_older(row.shard, row.epoch)
            if row.clean:
                self._marks.everything_before(row.shard, row.epoch)
        self._announce()

    def _announce(self) -> None:
        degraded = any(state.mode != "stream" for state in self.states)
        self._metrics["degraded"].labels(dependency="redis").set(degraded)
        self.reach.path_changed()
        self._changed.set()
        self._changed = asyncio.Event()
        for changed in self.on_change:
            changed()

    # --- Redis

    async def _follow_redis(self) -> None:
        looked_at = 0.0
        while True:
            await asyncio.sleep(_ASK_SECONDS)
            try:
                await self._ask_if_needed()
                if time.monotonic() - looked_at > _MARKS_SECONDS:
                    looked_at = time.monotonic()
                    await self._look_at_marks()
            except (Refused, LinkLost):
                self.suspect()
            except BufferError as error:
                _log.debug("no marks: %s", error)

    async def _look_at_marks(self) -> None:
        """Pub/sub may miss some, and who does not append gets none with its answers."""
        shards = [s for s in self.retention.shards() if self.states[s].mode == "stream"]
        if shards:
            await self._read_marks(shards)

    async def _read_marks(self, shards: list[int]) -> None:
        for shard, mark in zip(shards, await self._shards.marks(shards), strict=True):
            self._marks.update(shard, *mark)

    async def _ask_if_needed(self) -> None:
        """No heartbeat came through for a while: is Postgres away for those who judge, too?"""
        away = time.monotonic() > self._permitted_until - _PERMIT * self._timeout_seconds / 2
        self._metrics["degraded"].labels(dependency="postgres").set(away)
        shard = next((s for s, state in enumerate(self.states) if state.mode == "stream"), None)
        if shard is None or not away:
            self._questions.clear()
            return
        asked = time.monotonic()
        number, answered = await self._shards.ask(shard, self.states[shard].epoch)
        if number == 1:
            self._questions.clear()  # a new grant counts anew
        for question in [q for q in self._questions if q <= answered]:
            until = self._questions.pop(question) + _PERMIT_BY_REPORT * self._timeout_seconds
            self._permitted_until = max(self._permitted_until, until)
        self._questions[number] = asked

    # --- leaving

    async def leave(self) -> None:
        """Unregister, once what was acked here is in Postgres; what is not soon is left to Redis."""
        if not self._accepting:
            return
        await self._wait_for_flush()
        self._leaving = True
        if self._refreshing is not None:  # it may be about to register, or to join
            await asyncio.wait([self._refreshing], timeout=1)
        for state in self.states:
            state.mode = "joining"
        try:
            if self.retention.shards():
                _log.warning(
                    "%d acked items are not flushed yet; Redis alone holds them", self.retention.turns
                )
            else:
                async with asyncio.timeout(1):
                    await self._store.leave(self.process)
        except (BufferError, TimeoutError) as error:
            _log.debug("not unregistered: %s", error or "time-out")

    async def _wait_for_flush(self) -> None:
        seconds = min(_LAST_FLUSH_MOST_SECONDS, max(0.5, 4 * self._settings.flush_interval_seconds))
        deadline = time.monotonic() + seconds
        try:
            while (shards := self.retention.shards()) and time.monotonic() < deadline:
                await self._shards.nudge(*shards)
                await self._read_marks(shards)
                await asyncio.sleep(0.02)
        except (RedisUnavailable, Unavailable) as error:
            _log.debug("no last flush: %s", error)
