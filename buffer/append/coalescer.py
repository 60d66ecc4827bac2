"""Concurrent appends of this process go to a Redis node together: one round trip, one script a shard.

While a round trip is under way, newcomers gather; when it returns, they leave together. A lone append
leaves at once: it waits for the end of the event loop's turn, never for company.

What is certain about an operation that its caller gave up on:

* still in the queue and never sent: it will never be stored;
* sent, and no reply: unknown. It is sent again until its caller gives up, which is safe, since an id
  that Redis or Postgres knows is not stored a second time.
"""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import Sequence
from typing import Any

from buffer.errors import BufferError, Overloaded, RedisUnavailable
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
_PASSING_RETRY_SECONDS = 0.05


class Operation:
    """One append: items of one conversation, taken whole or not at all."""

    __slots__ = (
        "arguments",
        "conversation_key",
        "count",
        "expected",
        "future",
        "in_flight",
        "maybe_stored",
        "nbytes",
        "shard",
        "token",
    )

    def __init__(
        self, shard: int, conversation_key: str, arguments: list[bytes], nbytes: int, expected: int | None
    ) -> None:
        self.shard = shard
        self.conversation_key = conversation_key
        self.arguments = arguments  # four an item: id digest, body digest, header, payload
        self.count = len(arguments) // 4
        self.nbytes = nbytes
        self.expected = expected  # last position, 0 for "no items", None for any
        self.token = b""  # lease under which ``expected`` was confirmed in Postgres
        self.future: asyncio.Future[tuple[int, bytes]] = asyncio.get_running_loop().create_future()
        self.maybe_stored = False
        self.in_flight = False


class Coalescer:
    """The queue in front of one Redis node, and the task that empties it."""

    def __init__(
        self,
        link: Link,
        keys: Sequence[ShardKeys],
        path: Path,
        marks: Marks,
        *,
        most_operations: int,
        most_bytes: int,
    ) -> None:
        self._link = link
        self._keys = keys
        self._path = path
        self._marks = marks
        self._most_operations = most_operations
        self._most_bytes = most_bytes
        self._queue: deque[Operation] = deque()
        self._wakeup = asyncio.Event()
        self._refreshes: set[asyncio.Task[None]] = set()
        self.operations = 0  # accepted and not answered
        self.bytes = 0
        self._round_trip_seconds = 0.001
        self._taken_at_once = 1

    def submit(self, operation: Operation) -> asyncio.Future[tuple[int, bytes]]:
        """Queue an operation; its future gives the epoch and the script's answer.

        Raises:
            Overloaded: the queue is full; nothing was taken.
        """
        if self.operations >= self._most_operations or self.bytes + operation.nbytes > self._most_bytes:
            wait = self.operations / max(1, self._taken_at_once) * self._round_trip_seconds
            raise Overloaded(
                f"{self.operations} appends ({self.bytes} bytes) wait for Redis; the limits are "
                f"{self._most_operations} (append_queue_max) and {self._most_bytes} (append_queue_max_bytes)",
                retry_after=min(5.0, max(0.05, wait)),
            )
        self.operations += 1
        self.bytes += operation.nbytes
        self._queue.append(operation)
        self._wakeup.set()
        return operation.future

    async def run(self) -> None:
        """Serve the queue until cancelled; what is left then fails."""
        try:
            while True:
                await self._wakeup.wait()
                self._wakeup.clear()
                while self._queue:
                    await self._serve(self._take())
        finally:
            for refresh in self._refreshes:
                refresh.cancel()
            for operation in self._queue:
                self._fail(operation, RedisUnavailable("this process is closing"))
            self._queue.clear()
            await self._link.close()

    def _take(self) -> dict[int, list[Operation]]:
        """As many operations as one script call a shard can carry."""
        batches: dict[int, list[Operation]] = {}
        room: dict[int, tuple[int, int]] = {}
        left: list[Operation] = []
        while self._queue:
            operation = self._queue.popleft()
            if operation.future.done():  # its caller gave up
                self._finish(operation)
                continue
            arguments, nbytes = room.get(operation.shard, (0, 0))
            arguments += len(operation.arguments) + 7
            nbytes += operation.nbytes
            batch = batches.get(operation.shard)
            if batch and (arguments > _MOST_ARGUMENTS or nbytes > _MOST_BYTES):
                left.append(operation)
                if len(left) > 1_000:
                    break
                continue
            room[operation.shard] = (arguments, nbytes)
            batches.setdefault(operation.shard, []).append(operation)
        self._queue.extendleft(reversed(left))
        return batches

    async def _serve(self, batches: dict[int, list[Operation]]) -> None:
        if not batches:
            return
        epochs = self._path.epochs
        for operations in batches.values():
            for operation in operations:
                operation.in_flight = True
        commands = [self._command(shard, epochs[shard], operations) for shard, operations in batches.items()]
        loop = asyncio.get_running_loop()
        began = loop.time()
        try:
            replies = await self._link.round_trip(commands)
        except LinkLost as error:
            self._requeue(batches, maybe_stored=error.sent)
            await asyncio.sleep(self._link.retry_delay())
            return
        except asyncio.CancelledError:
            self._requeue(batches, maybe_stored=True)
            raise
        self._round_trip_seconds += 0.1 * (loop.time() - began - self._round_trip_seconds)
        self._taken_at_once = sum(map(len, batches.values()))
        for (shard, operations), reply in zip(batches.items(), replies, strict=True):
            self._deliver(shard, epochs[shard], operations, reply)

    def _command(self, shard: int, epoch: int, operations: list[Operation]) -> Command:
        keys = self._keys[shard]
        names = [keys.stream, keys.state, keys.ids, keys.ids_old]
        arguments = [b"%d" % epoch]
        for operation in operations:
            names.append(keys.tail(operation.conversation_key))
            arguments += (b"%d" % len(names), b"%d" % operation.count)
            if operation.expected is None:
                arguments.append(b"")
            else:
                position = operation.expected
                same_epoch = epoch_of(position) == epoch
                names.append(keys.lease(operation.conversation_key))
                arguments += (
                    b"%d" % sequence_of(position) if same_epoch else b"-",
                    b"%d" % len(names),
                    operation.token,
                )
            arguments += operation.arguments
        return script_call(scripts.APPEND, names, arguments)

    def _deliver(self, shard: int, epoch: int, operations: list[Operation], reply: Any) -> None:
        try:
            mark, *answers = checked(reply)
        except RedisUnavailable as error:
            # Redis took nothing of this call. What passes is tried again until the callers give up.
            for operation in operations:
                operation.in_flight = False
            if isinstance(error, Refused):
                self._refresh_then_requeue(operations)
            else:
                asyncio.get_running_loop().call_later(_PASSING_RETRY_SECONDS, self._put_back, operations)
            return
        except BufferError as error:
            for operation in operations:
                self._fail(operation, error)
            return
        self._marks.update(shard, epoch, int(mark))
        for operation, answer in zip(operations, answers, strict=True):
            self._finish(operation)
            if not operation.future.done():
                operation.future.set_result((epoch, answer))

    def _refresh_then_requeue(self, operations: list[Operation]) -> None:
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

    def _requeue(self, batches: dict[int, list[Operation]], *, maybe_stored: bool) -> None:
        operations = [operation for batch in batches.values() for operation in batch]
        for operation in operations:
            operation.in_flight = False
            operation.maybe_stored |= maybe_stored
        self._put_back(operations)

    def _put_back(self, operations: list[Operation]) -> None:
        self._queue.extendleft(reversed(operations))
        self._wakeup.set()

    def _finish(self, operation: Operation) -> None:
        operation.in_flight = False
        self.operations -= 1
        self.bytes -= operation.nbytes

    def _fail(self, operation: Operation, error: BufferError) -> None:
        self._finish(operation)
        if not operation.future.done():
            operation.future.set_exception(error)
