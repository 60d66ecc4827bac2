"""A seeded scheduler of generators: the only source of order, time and chance in the model.

A task runs up to its next ``yield``, so what lies between two of them is one atomic step. It yields None
(go on whenever the scheduler likes), a number of ticks to sleep, or a `Wait` for another task.
"""

from __future__ import annotations

import heapq
import random
from collections.abc import Generator
from typing import Any, NamedTuple

Steps = Generator[Any, Any, Any]

_HICCUP_SHARE = 0.08
_HICCUP_TICKS = 40


class Host:
    """What can be paused, killed and cut off from a store: a process, a flusher, or the clients' world."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.paused = False
        self.killed = False
        self.without_redis = False
        self.without_postgres = False
        self.server: Any = None  # the Redis server that it is connected to
        self.suspended_ticks = 0
        self.parked: list[Task] = []


class Expected(Exception):
    """Errors that are part of the protocol; any other one is a bug of the model."""


class Gone(Expected):
    """The host of a task was killed."""


class Task:
    """A running generator and, in the end, its result or error."""

    __slots__ = ("awaits", "done", "error", "host", "result", "steps", "turn", "waiter")

    def __init__(self, host: Host, steps: Steps) -> None:
        self.host = host
        self.steps = steps
        self.turn = 0
        self.done = False
        self.result: Any = None
        self.error: Exception | None = None
        self.waiter: Task | None = None
        self.awaits: Task | None = None


class Wait(NamedTuple):
    """Resume when ``task`` is done, or after ``ticks``."""

    task: Task
    ticks: int


class Schedule:
    """Runs tasks, one random step of a random one at a time; a tick passes with every step."""

    def __init__(self, seed: int) -> None:
        self.chance = random.Random(seed)
        self.random = self.chance.random
        self.now = 0
        self.smooth = False
        self._ready: list[Task] = []
        self._sleeping: list[tuple[int, int, Task, int]] = []
        self._count = 0

    def pick(self, low: int, high: int) -> int:
        """A random whole number, both ends included."""
        return low + int(self.random() * (high - low + 1))

    def spawn(self, host: Host, steps: Steps) -> Task:
        """Start a task."""
        task = Task(host, steps)
        self._ready.append(task)
        return task

    def resume(self, host: Host) -> None:
        """Let a paused host go on where it stood."""
        host.paused = False
        self._ready += host.parked
        host.parked = []

    def step(self) -> bool:
        """Let one task go on; False if none is left."""
        ready = self._ready
        while self._sleeping and (self._sleeping[0][0] <= self.now or not ready):
            wake, _, task, turn = heapq.heappop(self._sleeping)
            if task.turn == turn:
                self.now = max(self.now, wake)
                task.turn += 1
                if task.awaits is not None:
                    task.awaits.waiter = task.awaits = None
                ready.append(task)
        if not ready:
            return False
        index = int(self.random() * len(ready))
        task = ready[index]
        ready[index] = ready[-1]
        ready.pop()
        self._run(task)
        return True

    def _run(self, task: Task) -> None:
        if task.host.killed:
            self._finish(task, error=Gone())
            return
        if task.host.paused:
            task.host.parked.append(task)
            return
        self.now += 1
        try:
            wanted = next(task.steps)
        except StopIteration as end:
            self._finish(task, result=end.value)
        except Exception as error:  # noqa: BLE001 - whoever waits for the task decides
            self._finish(task, error=error)
        else:
            self._continue(task, wanted)

    def _continue(self, task: Task, wanted: Any) -> None:
        if wanted is None:
            if self.smooth or self.random() > _HICCUP_SHARE:
                self._ready.append(task)
            else:
                self._sleep(task, self.pick(1, _HICCUP_TICKS))
        elif type(wanted) is int:
            self._sleep(task, wanted)
        elif wanted.task.done:
            self._ready.append(task)
        else:
            wanted.task.waiter, task.awaits = task, wanted.task
            self._sleep(task, wanted.ticks)

    def _sleep(self, task: Task, ticks: int) -> None:
        self._count += 1
        heapq.heappush(self._sleeping, (self.now + ticks, self._count, task, task.turn))

    def _finish(self, task: Task, result: Any = None, error: Exception | None = None) -> None:
        task.done, task.result, task.error = True, result, error
        task.steps.close()
        waiter = task.waiter
        if waiter is not None and not waiter.done:
            task.waiter = waiter.awaits = None
            waiter.turn += 1
            self._ready.append(waiter)
        elif error is not None and waiter is None and not isinstance(error, Expected):
            raise error
