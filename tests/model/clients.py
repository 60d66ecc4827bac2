"""Clients: they send to any process, and repeat what they got no answer to, with the same id."""

from __future__ import annotations

from contextlib import suppress
from typing import Any

from tests.model.postgres import NOTHING
from tests.model.process import Process, Unavailable
from tests.model.redis_server import Conflict, Position, PreconditionFailed
from tests.model.schedule import Steps, Wait
from tests.model.world import Ack, Read, World

_PATIENCE_TICKS = 150


class Clients:
    """Writers and readers of the one conversation."""

    def __init__(self, world: World, processes: list[Process]) -> None:
        self.world = world
        self.processes = processes

    def _request(self, method: str, *arguments: Any) -> Steps:
        """Ask any process; what it answered, and who it was.

        Raises:
            Unavailable: an error that says to try again, a time-out, or a broken connection.
        """
        schedule = self.world.schedule
        process = self.processes[schedule.pick(0, len(self.processes) - 1)]
        task = schedule.spawn(process, getattr(process, method)(*arguments))
        yield Wait(task, schedule.pick(_PATIENCE_TICKS // 3, _PATIENCE_TICKS))
        if not task.done or isinstance(task.error, Unavailable) or process.killed:
            raise Unavailable
        if task.error is not None:
            raise task.error
        return task.result, process

    def writer(
        self, item_ids: list[str], body: str, *, if_match: bool = False, attempts: int, pace: int
    ) -> Steps:
        """Append these ids in turn, each until it is acked, rejected, or given up as unknown."""
        for item_id in item_ids:
            self.world.history.began.setdefault(item_id, self.world.schedule.now)
            expected = None
            for _ in range(attempts):
                try:
                    if if_match and expected is None:
                        expected = yield from self._last_position()
                    yield from self._append(item_id, body, expected)
                    break
                except Unavailable:
                    yield self.world.schedule.pick(5, 60)
                except Conflict:
                    break
                except PreconditionFailed:
                    self.world.history.rejected.append(item_id)
                    self.world.note(self.world.clients, "REJECTED", item_id)
                    break
            yield self.world.schedule.pick(1, pace)

    def _append(self, item_id: str, body: str, if_match: Position | None) -> Steps:
        position, process = yield from self._request("append", item_id, body, if_match)
        ack = Ack(self.world.schedule.now, item_id, body, position, process, if_match)
        self.world.history.acks.append(ack)
        self.world.note(self.world.clients, "ACK", item_id, body, position, "by", process.name)

    def _last_position(self) -> Steps:
        items, _ = yield from self.read_once()
        return items[-1].position if items else NOTHING

    def reader(self, count: int, pace: int) -> Steps:
        """Read now and then."""
        for _ in range(count):
            yield self.world.schedule.pick(5, pace)
            with suppress(Unavailable):
                yield from self.read_once()

    def read_once(self) -> Steps:
        """Read the conversation."""
        began = self.world.schedule.now
        (items, complete), process = yield from self._request("read")
        read = Read(began, self.world.schedule.now, items, complete, process)
        self.world.history.reads.append(read)
        shown = [entry.item_id for entry in items]
        self.world.note(self.world.clients, "READ", shown, "complete" if complete else "", "by", process.name)
        return items, complete
