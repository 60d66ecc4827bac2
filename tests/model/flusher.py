"""A flusher: takes the shard's stream into Postgres while it owns the shard."""

from __future__ import annotations

from contextlib import suppress
from typing import Any

from tests.model.manager import Manager
from tests.model.postgres import Mode
from tests.model.redis_server import Entry, RedisServer, Refused
from tests.model.rules import Rule
from tests.model.schedule import Host, Steps
from tests.model.world import Lost, World


class Flusher(Host):
    """Two tasks: the flush, and the management of the path (which needs no ownership)."""

    def __init__(self, world: World, name: str) -> None:
        super().__init__(name)
        self.world = world
        self.manager = Manager(world, self)

    def run(self) -> Steps:
        """Flush, for ever."""
        while True:
            yield self.world.schedule.pick(5, self.world.flush_ticks)
            with suppress(Lost, Refused):
                yield from self._flush()

    def _ask(self, transaction: Any, *arguments: Any) -> Steps:
        return (yield from self.world.call_postgres(self, transaction, *arguments))

    def _flush(self) -> Steps:
        world = self.world
        path, fence = yield from self._ask(world.postgres.own, self.name)
        if fence is None or path.mode is not Mode.STREAM:
            return
        yield from world.connect(self, path.run_id, Rule.RUN_ID_MANAGER)
        count = world.schedule.pick(1, 4)
        mark, entries = yield from world.call_redis(self, RedisServer.batch, path.epoch, count)
        if not entries:
            return
        if entries[0].position.number != mark + 1:
            world.postgres.broken.append("a hole in the stream: counted as loss")
            return
        if (yield from self._commit(fence, path.epoch, entries)):
            yield from world.connect(self, path.run_id, Rule.RUN_ID_MANAGER)
            after = entries[-1].position.number
            yield from world.call_redis(self, RedisServer.settle, path.epoch, mark, after)

    def _commit(self, fence: int, epoch: int, entries: list[Entry]) -> Steps:
        postgres = self.world.postgres
        if Rule.FLUSHED_THROUGH in self.world.rules:
            return (yield from self._ask(postgres.flush, fence, epoch, entries))
        if not (yield from self._ask(postgres.flush_mark, fence, epoch, entries)):
            return False
        return (yield from self._ask(postgres.flush_rows, fence, epoch, entries))
