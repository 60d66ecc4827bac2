"""Concurrent appends of this process go to a Redis node together: one script call a shard.

Up to `_DEPTH` batches are on their way at once, so that this process prepares one while Redis executes
the other; all on one connection, so that acks come in the order of positions. While the way is full,
newcomers gather. A lone append leaves at once: it waits for the end of the event loop's turn, never for
company.

A batch whose reply is lost is sent again until its callers give up, which is safe: an id that Redis or
Postgres knows is not stored a second time.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
from collections import deque
from collections.abc import Sequence
from typing import Any

from buffer.append.operation import Operation
from buffer.errors import BufferError, OutcomeUnknown, Overloaded, RedisUnavailable
from buffer.metrics import Metrics
from buffer.model.position import epoch_of, sequence_of
from buffer.path import Path
from buffer.stream import scripts
from buffer.stream.keys import ShardKeys
from buffer.stream.link import Command, Link, LinkLost, script_call
from buffer.stream.marks import Marks
from buffer.stream.shards import Refused, checked

_log = logging.getLogger(__name__)

# ElastiCache Serverless allows 3,999 arguments, Lua's unpack 8,000; one operation may go over alone.
_MOST_ARGUMENTS = 3_000
_MOST_BYTES = 4 << 20
_DEPTH = 2
_PASSING_RETRY_SECONDS = 0.05
_SWEEP_SECONDS = 0.05

_DIGITS = b"0123456789"
_DUPLICATE = ord("d")

# One script call: its shard, the epoch that it names, and its operations.
_Call = tuple[int, int, list[Operation]]


class Coalescer:
    """The queue in front of one Redis node, and the tasks that empty it."""

    def __init__(
        self,
        link: Link,
        keys: Sequence[ShardKeys],
        path: Path,
        marks: Marks,
        metrics: Metrics,
        *,
        most_operations: int,
        most_bytes: int,
    ) -> None:
        self._link = link
        self._keys = keys
        self._path = path
        self._marks = marks
        self._metrics = metrics
        self._most_operations = most_operations
        self._most_bytes = most_bytes
        self._queue: deque[Operation] = deque()
        self._under_way: deque[list[_Call]] = deque()
        self._to_send = asyncio.Event()
        self._to_receive = asyncio.Event()
        self._refreshes: set[asyncio.Task[None]] = set()
        self._parked: set[Operation] = set()  # on their way back to the queue, a little later
        self._closed = False
        self._loop = asyncio.get_running_loop()
        self._answered = 0
        self._answered_per_second = 1_000.0
        self.operations = 0  # accepted and not answered
        self.bytes = 0

    def submit(self, operation: Operation) -> asyncio.Future[tuple[int, bytes]]:
        """Queue an operation; its future gives the epoch and the script's answer.

        Raises:
            Overloaded: the queue is full; nothing was taken.
            RedisUnavailable: this process has closed.
        """
        if self._closed:
            raise _closing()
        if self.operations >= self._most_operations or self.bytes + operation.nbytes > self._most_bytes:
            raise Overloaded(
                f"{self.operations} appends ({self.bytes} bytes) wait for Redis; the limits are "
                f"{self._most_operations} (append_queue_max) and {self._most_bytes} (append_queue_max_bytes)",
                retry_after=min(5.0, max(0.05, self.operations / max(1.0, self._answered_per_second))),
            )
        self.operations += 1
        self.bytes += operation.nbytes
        self._queue.append(operation)
        self._to_send.set()
        return operation.future

    async def run(self) -> None:
        """Serve the queue until cancelled; what is left then fails."""
        try:
            async with asyncio.TaskGroup() as tasks:
                tasks.create_task(self._send(), name="append-send")
                tasks.create_task(self._receive(), name="append-receive")
                tasks.create_task(self._expire(), name="append-expire")
        finally:
            self._closed = True
            for refresh in self._refreshes:
                refresh.cancel()
            self._lose_what_is_under_way(_closing())
            for operation in (*self._queue, *self._parked):
                self._fail(operation, _closing(operation))
            self._queue.clear()
            await self._link.close()

    # --- out

    async def _send(self) -> None:
        while True:
            await self._to_send.wait()
            self._to_send.clear()
            while self._queue and len(self._under_way) < _DEPTH:
                calls = self._take()
                if not calls:
                    continue
                self._under_way.append(calls)
                commands = [self._command(*call) for call in calls]
                try:
                    await self._link.send(commands)
                except LinkLost as error:
                    self._lose_what_is_under_way(error, never_sent=None if error.sent else calls)
                    await asyncio.sleep(self._link.retry_delay())
                else:
                    self._to_receive.set()

    def _take(self) -> list[_Call]:
        """As many operations as one script call a shard can carry."""
        calls: dict[int, list[Operation]] = {}
        room: dict[int, list[int]] = {}
        left: list[Operation] = []
        queue = self._queue
        while queue and len(left) < 1_000:
            operation = queue.popleft()
            if operation.future.done():  # its caller gave up
                self._finish(operation)
                continue
            shard = operation.shard
            batch = calls.get(shard)
            if batch is None:
                batch = calls[shard] = []
                room[shard] = [_MOST_ARGUMENTS, _MOST_BYTES]
            used = room[shard]
            used[0] -= len(operation.arguments) + 4
            used[1] -= operation.nbytes
            if batch and (used[0] < 0 or used[1] < 0):
                left.append(operation)
                continue
            operation.in_flight = True
            batch.append(operation)
        queue.extendleft(reversed(left))
        epochs = self._path.epochs
        return [(shard, epochs[shard], batch) for shard, batch in calls.items()]

    def _command(self, shard: int, epoch: int, operations: list[Operation]) -> Command:
        arguments = [b"%d" % epoch]
        for operation in operations:
            count = len(operation.arguments) >> 2
            arguments += (operation.conversation, b"1" if count == 1 else b"%d" % count)
            position = operation.expected
            if position is None:
                arguments.append(b"")
            elif epoch_of(position) == epoch:
                arguments += (b"%d" % sequence_of(position), operation.token)
            else:
                arguments += (b"-", operation.token)
            arguments += operation.arguments
        keys = self._keys[shard]
        names = (keys.stream, keys.shard, keys.ids, keys.ids_old, keys.leases)
        return script_call(scripts.APPEND, names, arguments)

    # --- back

    async def _receive(self) -> None:
        while True:
            await self._to_receive.wait()
            self._to_receive.clear()
            while self._under_way:
                calls = self._under_way[0]
                try:
                    while calls:
                        reply = await self._link.receive()
                        self._deliver(*calls.pop(0), reply)
                except LinkLost as error:
                    if calls:  # else the sender noticed first, and has put them back
                        self._lose_what_is_under_way(error)
                    break
                self._under_way.popleft()
                self._to_send.set()

    def _deliver(self, shard: int, epoch: int, operations: list[Operation], reply: Any) -> None:
        try:
            mark, *answers = checked(reply)
        except RedisUnavailable as error:
            # Redis took nothing of this call. What passes is tried again until the callers give up.
            for operation in operations:
                operation.in_flight = False
                operation.trouble = str(error)
            self._parked.update(operations)
            if isinstance(error, Refused):
                self._refresh_then_put_back(operations)
            else:
                self._loop.call_later(_PASSING_RETRY_SECONDS, self._put_back, operations)
            return
        except BufferError as error:
            for operation in operations:
                self._fail(operation, error)
            return
        self._marks.update(shard, epoch, int(mark))
        now = self._loop.time()
        observe = self._metrics.append_seconds.observe
        nbytes = 0
        for operation, answer in zip(operations, answers, strict=True):
            operation.in_flight = False
            nbytes += operation.nbytes
            observe(now - operation.began)
            if not operation.future.done():
                operation.future.set_result((epoch, answer))
        self._answered += len(operations)
        self.operations -= len(operations)
        self.bytes -= nbytes
        self._count(operations, answers)

    def _count(self, operations: list[Operation], answers: list[bytes]) -> None:
        acked: dict[str, int] = {}
        for operation, answer in zip(operations, answers, strict=True):
            if answer[0] in _DIGITS:
                acked[operation.level] = acked.get(operation.level, 0) + len(operation.ids)
            elif answer[0] == _DUPLICATE:
                self._metrics.appends.inc(("stream", operation.level, "duplicate"), len(operation.ids))
        for level, items in acked.items():
            self._metrics.appends.inc(("stream", level, "acked"), items)

    def _refresh_then_put_back(self, operations: list[Operation]) -> None:
        async def refresh() -> None:
            try:
                await self._path.refresh()
            except BufferError as error:
                _log.warning("a shard refused its epoch, and the new one cannot be read: %s", error)
            await asyncio.sleep(_PASSING_RETRY_SECONDS)
            self._put_back(operations)

        task = asyncio.create_task(refresh(), name="path-refresh-after-refusal")
        self._refreshes.add(task)
        task.add_done_callback(self._refreshes.discard)

    def _lose_what_is_under_way(self, error: BufferError, *, never_sent: list[_Call] | None = None) -> None:
        """The connection is gone: what it carried goes back to the queue, in order, its outcome open."""
        lost: list[Operation] = []
        for calls in self._under_way:
            for _, _, operations in calls:
                for operation in operations:
                    operation.in_flight = False
                    operation.maybe_stored |= calls is not never_sent
                    operation.trouble = str(error)
                lost += operations
            calls.clear()
        self._under_way.clear()
        self._put_back(lost)

    def _put_back(self, operations: list[Operation]) -> None:
        self._parked.difference_update(operations)
        self._queue.extendleft(reversed(operations))
        self._to_send.set()

    def _finish(self, operation: Operation) -> None:
        operation.in_flight = False
        self.operations -= 1
        self.bytes -= operation.nbytes

    def _fail(self, operation: Operation, error: BufferError) -> None:
        self._finish(operation)
        if not operation.future.done():
            operation.future.set_exception(error)

    async def _expire(self) -> None:
        """End operations whose time is up. A timer for each would cost more than the rest of the queue."""
        while True:
            await asyncio.sleep(_SWEEP_SECONDS)
            answered, self._answered = self._answered / _SWEEP_SECONDS, 0
            self._answered_per_second += 0.2 * (answered - self._answered_per_second)
            now = self._loop.time()
            under_way = [operations for calls in self._under_way for _, _, operations in calls]
            for operation in itertools.chain(self._queue, self._parked, *under_way):
                if operation.began + operation.limit_seconds <= now:
                    operation.expire()


def _closing(operation: Operation | None = None) -> BufferError:
    if operation is not None and operation.maybe_stored:
        text = "this process closed before Redis answered; repeat it with the same ids"
        return OutcomeUnknown(text, ids=operation.ids)
    return RedisUnavailable("this process is closing")
