"""A flusher's side of the path protocol: it watches Redis, and moves the path; see the package.

Any number of managers may run at once: each of their steps compares what they saw with what is there.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import secrets
import time
from collections.abc import Callable
from datetime import datetime

import anyio

from buffer.errors import BufferError, RedisUnavailable
from buffer.model.position import pack
from buffer.model.record import UnknownRecordFormat
from buffer.path.retention import placed
from buffer.policy.watched import Watched
from buffer.settings import Settings
from buffer.store.path_moves import Judgement, Look, ManagedPath, PathMoves, Process, Went
from buffer.store.paths import Mode
from buffer.store.placing import Placed
from buffer.stream.grants import Fence, Grants, Standing
from buffer.stream.link import LinkLost, WrongServer
from buffer.stream.shards import Refused

_log = logging.getLogger(__name__)

# Shares of the heartbeat time-out. A manager that did not reach Postgres for so long has lost touch: it says
# so to processes, and afterwards begins anew to watch heartbeats. Its judgement counts for a shorter time
# after a look, so none is still on its way when it says so.
_OUT_OF_TOUCH = 0.4
_JUDGEMENT = 0.3
_LOOK_LIMIT = 0.3
_LOOK_EVERY = 0.06
# A manager that could not make itself known in Redis judges only after so many time-outs: longer than a
# process can go on by the reports of managers that are gone.
_UNKNOWN_PATIENCE = 4.0

_PROBE_SECONDS = 0.1
_SOON_SECONDS = 0.03
_SALVAGE_CHUNK = 1_000


class Manager:
    """The manager of one flusher."""

    def __init__(
        self,
        settings: Settings,
        store: PathMoves,
        make_grants: Callable[[Callable[[], str | None]], Grants],
        name: str,
        on_change: Callable[[], None],
    ) -> None:
        self._settings = settings
        self._store = store
        self._make_grants = make_grants
        self._grants = make_grants(lambda: self._wanted_run_id)
        self._reports = make_grants(lambda: self._wanted_run_id)
        self._name = name
        self._on_change = on_change
        self._timeout_seconds = settings.heartbeat_timeout_seconds
        self._wanted_run_id: str | None = None
        self._look: Look | None = None
        self._looked_at: datetime | None = None  # by Postgres's clock
        self._processes = Watched()
        self._managers = Watched()
        self._reached_at = time.monotonic()
        self._watching_since = time.monotonic()
        self._redis_seen_at = time.monotonic()
        self._redis_seen = False
        self._questions: dict[int, int] = {}
        self._known_in: dict[int, int] = {}  # shard to the epoch in whose grant this manager is known
        self._put_out: dict[str, dict[int, tuple[int, int]]] = {}
        self._modes: dict[int, tuple[int, Mode]] = {}
        self._ahead: dict[int, tuple[int, int | None]] = {}
        self._lost: dict[tuple[int, int], str] = {}
        self._last: dict[int, int] = {}  # shard to the last position that Redis was seen to have given out
        self._running = anyio.CancelScope()
        self._ended = asyncio.Event()
        self.cut_off = False  # this manager cannot reach Redis, and others can

    async def run(self) -> None:
        """Manage the path until cancelled."""
        try:
            with self._running:
                async with anyio.create_task_group() as tasks:
                    tasks.start_soon(self._manage, name="path-manage")
                    tasks.start_soon(self._report, name="path-report")
        finally:
            self._ended.set()
            await self._grants.close()
            await self._reports.close()

    async def _manage(self) -> None:
        while True:
            pause = _PROBE_SECONDS
            try:
                pause = await self._step()
            except (BufferError, TimeoutError) as error:
                _log.debug("path manager: %s", error or "time-out")
            await asyncio.sleep(pause)

    async def _report(self) -> None:
        while True:
            await asyncio.sleep(_PROBE_SECONDS)
            if time.monotonic() - self._reached_at > _OUT_OF_TOUCH * self._timeout_seconds:
                with contextlib.suppress(BufferError):
                    await self._say_that_postgres_is_away()

    async def resign(self) -> None:
        """Leave the others to it: from then on no process waits for its word, since it judges nobody."""
        self._running.cancel()
        await self._ended.wait()
        grants = self._make_grants(lambda: self._wanted_run_id)
        try:
            async with asyncio.timeout(1):
                await self._store.resign(self._name)
                await grants.dismiss(list(self._modes), self._name)
        except (BufferError, TimeoutError) as error:
            _log.debug("not resigned: %s", error or "time-out")
        finally:
            await grants.close()

    def lose(self, shard: int, epoch: int, why: str) -> None:
        """Redis does not hold what it should of this epoch of a shard: close its path."""
        self._lost[shard, epoch] = why

    async def _step(self) -> float:
        """One look at both stores, and what follows from it; the pause until the next one."""
        now = time.monotonic()
        look = self._look
        if look is None or now - self._reached_at > _LOOK_EVERY * self._timeout_seconds or self._unsettled():
            look = await self._look_at_postgres()
        by_mode = {
            mode: [p for p in look.paths if p.mode == mode] for mode in ("stream", "closing", "direct")
        }
        if by_mode["stream"]:
            await self._watch_redis(by_mode["stream"])
        if by_mode["closing"]:
            await self._open_direct(by_mode["closing"])
        if by_mode["direct"]:
            await self._go_back(by_mode["direct"])
        return _SOON_SECONDS if by_mode["closing"] else _PROBE_SECONDS

    def _unsettled(self) -> bool:
        return self._look is None or any(path.mode != "stream" for path in self._look.paths)

    # --- Postgres

    async def _look_at_postgres(self) -> Look:
        sent = time.monotonic()
        if sent - self._reached_at > _OUT_OF_TOUCH * self._timeout_seconds:
            self._lose_touch(sent)
        seen_ago = sent - self._redis_seen_at if self._redis_seen else None
        async with asyncio.timeout(_LOOK_LIMIT * self._timeout_seconds):
            look = await self._store.look(self._name, seen_ago)
        now = time.monotonic()
        if not look.again:
            self._lose_touch(now)
            self._known_in.clear()
        self._processes.see({name: process.beats for name, process in look.processes.items()}, now)
        self._managers.see({n: looks for n, looks in look.managers.items() if n != self._name}, now)
        self._look, self._reached_at, self._redis_seen = look, now, False
        self._looked_at = look.looked_at
        modes = {path.shard: (path.epoch, path.mode) for path in look.paths}
        if modes != self._modes:
            self._modes = modes
            self._begin_anew(now)
            self._on_change()
        return look

    def _begin_anew(self, now: float) -> None:
        """The path has moved: what was seen of the grants before says nothing of those that stand now."""
        self._redis_seen_at, self.cut_off = now, False
        self._questions = {}
        self._put_out.clear()

    def _lose_touch(self, now: float) -> None:
        self._processes.forget()
        self._managers.forget()
        self._watching_since = now

    def _judgement(self, paths: list[ManagedPath]) -> Judgement:
        """Who was silent for a time-out; nobody, while this manager may not judge."""
        assert self._looked_at is not None
        now = time.monotonic()
        silent = self._processes.silent(self._timeout_seconds, now)
        # A path that is closing has no grant any more: the epoch before it is the one that counts.
        grants = {path.shard: path.epoch if path.mode == "stream" else path.epoch - 1 for path in paths}
        known = all(self._known_in.get(shard) == epoch for shard, epoch in grants.items())
        if not known and now - self._watching_since < _UNKNOWN_PATIENCE * self._timeout_seconds:
            silent = {}
        return Judgement(self._name, self._looked_at, _JUDGEMENT * self._timeout_seconds, silent)

    async def _say_that_postgres_is_away(self) -> None:
        """Tell the processes, through Redis, that nobody is judged by this manager now."""
        self._lose_touch(time.monotonic())
        epochs = {shard: epoch for shard, (epoch, mode) in self._modes.items() if mode == "stream"}
        if epochs:
            modes = self._modes
            asked = await self._reports.report(epochs, self._name, self._questions)
            if modes is self._modes:  # else these are the questions of grants that are over
                self._questions = asked

    # --- stream: watch Redis

    async def _watch_redis(self, paths: list[ManagedPath]) -> None:
        self._wanted_run_id = max(paths, key=lambda path: path.epoch).run_id
        try:
            standing = await self._grants.probe([path.shard for path in paths])
        except WrongServer:
            await self._close(paths, "another server answers than the one that was granted the epoch")
            return
        except RedisUnavailable as error:  # no answer, or one that says: not now
            if time.monotonic() - self._redis_seen_at > self._settings.redis_lost_seconds:
                limit = self._settings.redis_lost_seconds
                await self._close(paths, f"no answer for {limit:g} s ({error})", unless_seen_seconds=limit)
            return
        self._note_seen(paths, standing)
        ungranted = [
            (path, stands) for path, stands in zip(paths, standing, strict=True) if stands.epoch != path.epoch
        ]
        again = [path for path, stands in ungranted if stands.fence and stands.fence == path.fence_mark]
        ahead = [(path, stands) for path, stands in ungranted if (stands.epoch or 0) > path.epoch]
        gone = [path for path, stands in ungranted if path not in again and (stands.epoch or 0) < path.epoch]
        for path, stands in ahead:
            await self._catch_up(path, stands)
        if again:
            await self._grant_again(again)
        for path in paths:
            if why := self._lost.get((path.shard, path.epoch)):
                await self._close([path], why)
        self._lost.clear()
        if gone:
            await self._close(gone, "it holds no grant any more: its data is gone, or older")
        if not ungranted:
            await self._make_known(paths)
            await self._put_out_silent(paths)

    def _note_seen(self, paths: list[ManagedPath], standing: list[Standing]) -> None:
        self._redis_seen_at, self._redis_seen, self.cut_off = time.monotonic(), True, False
        for path, stands in zip(paths, standing, strict=True):
            if stands.epoch == path.epoch and stands.last >= 0:
                self._last[path.shard] = pack(path.epoch, stands.last)

    async def _close(
        self, paths: list[ManagedPath], why: str, *, unless_seen_seconds: float | None = None
    ) -> None:
        closed = await self._store.close(
            self._name,
            {path.shard: path.epoch for path in paths},
            why,
            last=self._last,
            unless_seen_seconds=unless_seen_seconds,
        )
        self._look = None
        self.cut_off = unless_seen_seconds is not None and not closed
        if closed:
            through = {path.shard: path.flushed_through for path in paths if path.shard in closed}
            _log.error("Redis is lost: %s; the paths close, flushed through (by shard) %s", why, through)

    async def _grant_again(self, paths: list[ManagedPath]) -> None:
        """The fence still stands: the grant never came."""
        went = await self._store.grantees({path.shard: path.epoch for path in paths})
        await self._grant(went, {path.shard: path.fence_mark or "" for path in paths})

    async def _make_known(self, paths: list[ManagedPath]) -> None:
        """A manager that the grants know of may judge: nobody goes on without its word."""
        unknown = {p.shard: p.epoch for p in paths if self._known_in.get(p.shard) != p.epoch}
        if unknown:
            await self._grants.report(unknown, self._name, {})
            self._known_in.update(unknown)
            self._questions = {}
            self._watching_since = time.monotonic()
            self._processes.forget()

    async def _put_out_silent(self, paths: list[ManagedPath]) -> None:
        look = self._look
        if look is None:
            return
        judgement = self._judgement(paths)
        for name in list(self._put_out):
            if name not in judgement.silent:
                del self._put_out[name]
        for name in judgement.silent:
            if name not in self._put_out:
                registered = look.processes[name]
                _log.warning("process %s is silent: it is put out", name)
                self._put_out[name] = await self._kick(paths, name, registered)
            if await self._store.unregister(judgement, name, self._put_out[name]):
                self._put_out.pop(name)
                self._look = None
        await self._dismiss_silent_managers([path.shard for path in paths])

    async def _kick(
        self, paths: list[ManagedPath], name: str, process: Process
    ) -> dict[int, tuple[int, int]]:
        through = {}
        for path in paths:
            if process.confirmed[path.shard] is not None:
                last = await self._grants.kick(path.shard, path.epoch, name)
                # Nothing given out: whatever is flushed covers it.
                through[path.shard] = (path.epoch, pack(path.epoch, last) if last >= 0 else 0)
        return through

    async def _dismiss_silent_managers(self, shards: list[int]) -> None:
        """Processes must not wait for the word of a manager that is gone."""
        for name, looks in self._managers.silent(2 * self._timeout_seconds, time.monotonic()).items():
            if await self._store.dismiss(name, looks):
                await self._grants.dismiss(shards, name)

    async def _catch_up(self, path: ManagedPath, stands: Standing) -> None:
        """Postgres always knows of an epoch before Redis does, unless it was rolled back."""
        if self._ahead.get(path.shard) != (path.epoch, stands.epoch):
            self._ahead[path.shard] = (path.epoch, stands.epoch)  # or this look is older: see it twice
            self._look = None
            return
        assert stands.epoch is not None
        run_id = self._grants.run_id
        if await self._store.catch_up(path.shard, path.epoch, stands.epoch, stands.mark, run_id):
            _log.critical(
                "shard %d: Redis was granted epoch %d, and Postgres says %d: it was restored or rolled back",
                path.shard,
                stands.epoch,
                path.epoch,
            )
        self._look = None

    # --- closing, direct

    async def _open_direct(self, paths: list[ManagedPath]) -> None:
        judgement = self._judgement(paths)
        opened, missing = await self._store.open_direct(judgement, {path.shard: path.epoch for path in paths})
        self._look = None
        if opened:
            _log.warning("shards %s go on without Redis: appends go to Postgres", sorted(opened))
        for shard, process in missing:
            _log.error("shard %d: process %s is silent, and may hold acked items", shard, process)

    async def _go_back(self, paths: list[ManagedPath]) -> None:
        """Fence whatever Redis there is, salvage what it holds, and grant it the next epoch."""
        self._wanted_run_id = None
        fences: dict[int, Fence] = {}
        try:
            for path, stands in zip(paths, await self._grants.probe([p.shard for p in paths]), strict=True):
                if (stands.epoch or 0) > path.epoch:
                    await self._catch_up(path, stands)
                    return
            run_id = self._wanted_run_id = self._grants.run_id  # the rest is done there, or not at all
            for path in paths:
                fences[path.shard] = await self._grants.fence(path.shard, path.epoch, secrets.token_hex(8))
        except (LinkLost, Refused):
            return
        held_all = set()
        for path in paths:
            fence = fences[path.shard]
            if path.clean and fence.entries:
                _log.info("shard %d: an older Redis is dropped: Postgres has what was acked", path.shard)
            elif fence.entries and not await self._salvage(path):
                return
            if fence.ended == path.epoch - 1 and path.run_id in {run_id, None}:
                held_all.add(path.shard)
        went = await self._store.go_back(
            {path.shard: path.epoch for path in paths},
            run_id,
            {shard: fence.text for shard, fence in fences.items()},
            held_all,
            write_off_seconds=self._settings.write_off_seconds,
            window_seconds=self._settings.idempotency_window_seconds,
        )
        self._look = None
        await self._grant(went, {shard: fence.text for shard, fence in fences.items()})
        if went.epochs:
            _log.warning("shards %s are back in Redis", sorted(went.epochs))

    async def _grant(self, went: Went, fences: dict[int, str]) -> None:
        for shard, epoch in went.epochs.items():
            if await self._grants.grant(shard, epoch, fences[shard], went.members[shard], went.managers):
                self._redis_seen_at = time.monotonic()
                if self._name in went.managers:
                    self._known_in[shard] = epoch
                self._questions = {}
                self._on_change()

    async def _salvage(self, path: ManagedPath) -> bool:
        """Bring what the last stream epoch left in Redis; False if the path has moved on."""
        epoch, after, turns = path.epoch - 1, -1, 0
        while True:
            entries = await self._grants.entries(path.shard, epoch, after, _SALVAGE_CHUNK)
            if not entries:
                break
            rows: list[Placed] = []
            for entry_id, header, data in entries:
                after = int(entry_id.split(b"-")[1])
                try:
                    rows.append(placed(pack(epoch, after), header, data))
                except UnknownRecordFormat as error:
                    _log.critical("shard %d is held: a newer release wrote to it: %s", path.shard, error)
                    return False
            if not await self._store.salvage(path.shard, path.epoch, rows):
                return False
            turns += len(rows)
        _log.warning("shard %d: %d items of epoch %d found in Redis", path.shard, turns, epoch)
        return True
