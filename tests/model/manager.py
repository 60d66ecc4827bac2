"""The path manager that every flusher runs; any number may run at once.

It closes the path when Redis is lost, opens direct when nobody acks in the old epoch any more, and goes
back to the stream when there is a Redis again. It also puts out processes whose heartbeat has run out.
"""

from __future__ import annotations

from contextlib import suppress
from typing import Any

from tests.model.postgres import OUT_OF_TOUCH_TICKS, Mode, Path, Stale
from tests.model.redis_server import NEVER, RedisServer, Refused
from tests.model.rules import Rule
from tests.model.schedule import Host, Steps
from tests.model.world import Lost, World, WrongServer

_TRIES = 3


class Manager:
    """What it remembers between two looks at the row."""

    def __init__(self, world: World, host: Host) -> None:
        self.world = world
        self.host = host
        self.unreachable = 0
        self.path = world.postgres.path
        self.reached_at = 0
        self.out_of_touch = False
        self.server_time = NEVER

    def run(self) -> Steps:
        """Manage the path, for ever."""
        while True:
            yield self.world.schedule.pick(10, 60)
            with suppress(Lost, Refused, Stale):
                yield from self._manage()

    def _manage(self) -> Steps:
        look = self.world.postgres.look
        try:
            path, seen_at, expired = yield from self._ask(
                look, self.host.name, out_of_touch=self.out_of_touch
            )
        except Lost:
            yield from self._report()
            return
        self.path, self.reached_at = path, self.world.schedule.now
        self.out_of_touch, self.server_time = False, NEVER
        if path.mode is Mode.STREAM:
            yield from self._watch_redis(path, expired)
        elif path.mode is Mode.CLOSING:
            yield from self._ask(self.world.postgres.open_direct, self.host.name, seen_at, path.epoch)
        else:
            yield from self._go_back(path)

    def _report(self) -> Steps:
        """Tell the processes, through Redis, that Postgres is away for this manager as well.

        From here on it judges nobody until it was in touch for a whole heartbeat time-out. A report bears a
        time that the server told before, so one that is delivered late does not look like a new one.
        """
        if self.world.schedule.now - self.reached_at <= OUT_OF_TOUCH_TICKS:
            return
        self.out_of_touch = True
        yield from self.world.connect(self.host, self.path.run_id, Rule.RUN_ID_MANAGER)
        if self.server_time == NEVER:
            self.server_time = yield from self._run(RedisServer.time)
        at, name = self.server_time, self.host.name
        self.server_time = yield from self._run(RedisServer.report, self.path.epoch, name, at)

    def _ask(self, transaction: Any, *arguments: Any, **flags: bool) -> Steps:
        return (yield from self.world.call_postgres(self.host, transaction, *arguments, **flags))

    def _run(self, script: Any, *arguments: Any) -> Steps:
        if self.host.server is None:
            raise Lost
        return (yield from self.world.call_redis(self.host, script, *arguments))

    def _watch_redis(self, path: Path, expired: list[str]) -> Steps:
        try:
            yield from self.world.connect(self.host, path.run_id, Rule.RUN_ID_MANAGER)
            yield from self._run(RedisServer.probe, path.epoch)
            self.unreachable = 0
        except Refused:
            if (yield from self._grant_again(path)):
                return
            self.unreachable = _TRIES
        except WrongServer:
            self.unreachable = _TRIES
        except Lost:
            self.unreachable += 1
        if self.unreachable >= _TRIES:
            self.unreachable = 0
            yield from self._ask(self.world.postgres.close, path)
        elif not self.unreachable:
            for name in expired:
                yield from self._put_out(path.epoch, name)

    def _grant_again(self, path: Path) -> Steps:
        """Where the fence still stands the grant never came; where nothing stands, the data is gone."""
        fence = yield from self._run(RedisServer.standing_fence)
        if fence is None or fence != path.fence:
            return False
        members, managers = yield from self._ask(self.world.postgres.registered, path.epoch)
        yield from self._run(RedisServer.grant, path.epoch, fence, members, managers)
        return True

    def _put_out(self, epoch: int, name: str) -> Steps:
        """Kick a process in Redis, then unregister it when all before that is flushed."""
        if Rule.KICK_FIRST in self.world.rules:
            through = yield from self._run(RedisServer.kick, epoch, name)
        else:
            through = yield from self._run(RedisServer.probe, epoch)
        for _ in range(10):
            if (yield from self._ask(self.world.postgres.unregister, name, epoch, through)):
                return
            yield self.world.schedule.pick(5, 30)

    def _go_back(self, path: Path) -> Steps:
        """Fence, salvage, and grant the next epoch at whatever Redis is there."""
        yield from self.world.connect(self.host, None)
        server = self.host.server
        nonce = self.world.schedule.pick(1, 1_000_000)
        fence, held = yield from self._run(RedisServer.put_up_fence, path.epoch, nonce)
        held_all = server.run_id == path.run_id and fence.found == path.epoch - 1
        go_back = self.world.postgres.go_back
        went = yield from self._ask(go_back, path.epoch, server.run_id, fence, held, held_all=held_all)
        if went is None:
            return
        path, members, managers = went
        if path.mode is not Mode.STREAM:
            return
        yield from self.world.connect(self.host, path.run_id)
        yield from self._run(RedisServer.grant, path.epoch, fence, members, managers)
