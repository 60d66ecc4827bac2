"""Concurrent appends of this process go to a Redis node together: one script call a shard.

Up to `_DEPTH` batches are on their way at once, so that this process prepares one while Redis executes
the other; all on one connection, so that acks come in the order of positions. While the way is full,
newcomers gather. A lone append leaves at once: it waits for the end of the event loop's turn, never for
company.

A batch whose reply is lost is sent again until its callers give up, which is safe: an id that Redis or
Postgres knows is not stored a second time. Where the path of a shard is direct, its appends are handed to
`buffer.append.direct`; where it changes, they wait here.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import time
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any

import anyio

from buffer.append.answers import count, is_taken, retain
from buffer.append.capacity import Capacity
from buffer.append.direct import Direct, Outcome
from buffer.append.operation import Answer, Operation
from buffer.append.packing import append_call
from buffer.errors import BufferError, OutcomeUnknown, Overloaded, RedisUnavailable
from buffer.metrics import Metrics
from buffer.path.member import Member
from buffer.settings import Settings
from buffer.store.pool import Database
from buffer.stream.keys import ShardKeys
from buffer.stream.link import Command, Link, LinkLost
from buffer.stream.marks import Marks
from buffer.stream.shards import OutOfMemory, Refused, checked

# ElastiCache Serverless allows 3,999 arguments, Lua's unpack 8,000; one operation may go over alone.
_MOST_ARGUMENTS = 3_000
_MOST_BYTES = 4 << 20
_DEPTH = 2
# What waits for something to pass is tried again this often, and expires this late at the most.
_SWEEP_SECONDS = 0.05
_WAIT = b"w"


# One script call: its shard, the epoch that it names, and its operations.
Call = tuple[int, int, list[Operation]]


class Coalescer:
    """The queue in front of one Redis node, and the tasks that empty it."""

    def __init__(
        self,
        link: Link,
        keys: Sequence[ShardKeys],
        member: Member,
        marks: Marks,
        database: Database,
        capacity: Capacity,
        metrics: Metrics,
        settings: Settings,
    ) -> None:
        self._link = link
        self._keys = keys
        self._member = member
        self._direct = Direct(database, member, self._put_back, self._deliver_direct)
        self._marks = marks
        self._capacity = capacity
        self._metrics = metrics
        self._settings = settings
        self._most_operations = settings.append_queue_max
        self._most_bytes = settings.append_queue_max_bytes
        self._queue: deque[Operation] = deque()
        self._under_way: deque[list[Call]] = deque()
        self._losses = 0  # how often all that was under way was put back
        self._to_send = asyncio.Event()
        self._to_receive = asyncio.Event()
        self._reach = member.reach
        self._connecting = False
        self._parked: dict[Operation, None] = {}  # in their order, until they go back to the queue
        self._closed = False
        self._loop = asyncio.get_running_loop()
        self._answered = 0
        self._answered_per_second = 1_000.0
        self.operations = 0  # accepted and not answered
        self.bytes = 0
        member.on_change.append(self._path_changed)

    def submit(self, operation: Operation) -> asyncio.Future[Answer]:
        """Queue an operation; its future gives the epoch and the answer of whichever store took it.

        Raises:
            Overloaded: the queue is full, or there is no room for more; nothing was taken.
            RedisUnavailable: this process has closed, or it alone has lost Redis.
        """
        if self._closed:
            raise _closing()
        self._reach.refuse_if_alone(operation.shard)
        if self._member.states[operation.shard].mode == "stream":
            self._capacity.check()
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
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(self._send, name="append-send")
                tasks.start_soon(self._receive, name="append-receive")
                tasks.start_soon(self._direct.run, name="append-direct")
                tasks.start_soon(self._expire, name="append-expire")
        finally:
            self._closed = True
            self._lose_what_is_under_way(_closing())
            for operation in {*self._queue, *self._parked, *self._direct.everything()}:
                self._fail(operation, _closing(operation))
            self._queue.clear()
            await self._link.close()

    def _path_changed(self) -> None:
        """What was sent in an epoch that is over is not waited for; what waits goes where the path leads."""
        states = self._member.states
        calls = [call for calls in self._under_way for call in calls]
        moved = any(not states[shard].at(epoch, "stream") for shard, epoch, _ in calls)
        if moved and not self._connecting:  # else they are not sent yet
            error = RedisUnavailable("the path has changed")
            self._lose_what_is_under_way(error)
            self._link.abort()
        self._unpark(list(self._parked))

    # --- out

    async def _send(self) -> None:
        while True:
            await self._to_send.wait()
            self._to_send.clear()
            if self._reach.is_sought and not self._queue and not self._under_way:
                await self._look_for_redis()
            while self._queue and len(self._under_way) < _DEPTH:
                calls = self._take()
                if not calls:
                    continue
                self._under_way.append(calls)
                commands = self._commands(calls)
                losses = self._losses
                try:
                    if not self._link.connected and not await self._connect():
                        error = RedisUnavailable("the path has changed")
                        self._lose_what_is_under_way(error, never_sent=calls)
                        continue
                    await self._link.send(commands)
                except LinkLost as error:
                    self._lost(error, never_sent=None if error.sent else calls)
                    await self._reach.wait(asyncio.sleep(self._link.retry_delay()))
                else:
                    if losses == self._losses:
                        self._to_receive.set()
                    else:  # they were put back while they were sent: nobody may read their replies
                        await self._link.close()

    async def _connect(self) -> bool:
        """Whether there is a connection before the path changes."""
        self._connecting = True
        try:
            return await self._reach.wait(self._link.send([]))
        finally:
            self._connecting = False

    async def _look_for_redis(self) -> None:
        """Nobody waits for it now; but who comes next should know whether it is there."""
        await self._link.close()  # an old connection tells nothing
        with contextlib.suppress(LinkLost):
            if await self._connect():
                self._reach.found()

    def _lost(self, error: LinkLost, never_sent: list[Call] | None = None) -> None:
        self._reach.lost()
        self._member.suspect()
        self._lose_what_is_under_way(error, never_sent=never_sent)

    def _take(self) -> list[Call]:
        """As many operations as one script call a shard can carry."""
        calls: dict[int, list[Operation]] = {}
        room: dict[int, list[int]] = {}
        left: list[Operation] = []
        direct: list[Operation] = []
        unknown: list[Operation] = []
        queue, states, permitted, now = (
            self._queue,
            self._member.states,
            self._member.permitted(),
            time.monotonic(),
        )
        while queue and len(left) < 1_000:
            operation = queue.popleft()
            if operation.future.done():  # its caller gave up
                self._finish(operation)
                continue
            shard = operation.shard
            state = states[shard]
            if state.mode != "stream" or not permitted:
                if state.mode == "direct":
                    direct.append(operation)
                else:
                    self._parked[operation] = None
                continue
            if (
                state.ids_known_at > now
                and (operation.maybe_stored or not operation.fresh)
                and operation.looked_up_in != state.epoch
            ):
                unknown.append(operation)
                continue
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
        if direct:
            self._direct.submit(direct)
        if unknown:
            self._direct.look_up(unknown)
        return [(shard, states[shard].epoch, batch) for shard, batch in calls.items()]

    def _commands(self, calls: list[Call]) -> list[Command]:
        """What goes over the wire for these calls."""
        return [
            append_call(self._keys[shard], self._member.field, epoch, operations)
            for shard, epoch, operations in calls
        ]

    # --- back

    async def _receive(self) -> None:
        while True:
            await self._to_receive.wait()
            self._to_receive.clear()
            while self._under_way:
                calls = self._under_way[0]
                try:
                    await self._receive_replies(calls)
                except LinkLost as error:
                    if calls:  # else the sender noticed first, and has put them back
                        self._lost(error)
                    break
                self._reach.found()
                if self._under_way and self._under_way[0] is calls:  # else the path has changed
                    self._under_way.popleft()
                self._to_send.set()

    async def _receive_replies(self, calls: list[Call]) -> None:
        while calls:
            reply = await self._link.receive()
            if calls:  # else they were put back meanwhile
                self._deliver(*calls.pop(0), reply)

    def _deliver(
        self, shard: int, epoch: int, operations: list[Operation], reply: Any, *, replicated: bool = True
    ) -> None:
        try:
            mark, *answers = checked(reply)
        except BufferError as error:
            self._not_run(shard, epoch, operations, error)
            return
        self._marks.update(shard, epoch, int(mark))
        if not self._member.may_ack(shard, epoch):
            self._not_an_ack(operations)
            return
        self._retain(shard, epoch, operations, answers)
        if not replicated:
            operations, answers = self._hold_back(
                operations, answers, is_taken, "too few replicas have confirmed"
            )
        if _WAIT in answers:
            operations, answers = self._hold_back(
                operations, answers, _WAIT.__eq__, "an erasure of the conversation is not flushed yet"
            )
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
        count(self._metrics, operations, answers)

    def _hold_back(
        self,
        operations: list[Operation],
        answers: list[bytes],
        which: Callable[[bytes], bool],
        trouble: str,
    ) -> tuple[list[Operation], list[bytes]]:
        """What Redis took and too few replicas have, or what must wait, is sent again; the rest is left."""
        rest = []
        for operation, answer in zip(operations, answers, strict=True):
            if which(answer):
                operation.in_flight = False
                operation.trouble = trouble
                if is_taken(answer):
                    operation.maybe_stored = True
                    operation.reached = "buffered"
                self._parked[operation] = None
            else:
                rest.append((operation, answer))
        return [operation for operation, _ in rest], [answer for _, answer in rest]

    def _not_run(self, shard: int, epoch: int, operations: list[Operation], error: BufferError) -> None:
        """Redis took nothing of this call. What passes is tried again until the callers give up."""
        if isinstance(error, Refused):
            self._member.refused(shard, epoch)
        for operation in operations:
            operation.in_flight = False
            operation.trouble = str(error)
            if not isinstance(error, RedisUnavailable):
                self._fail(operation, error)
            elif isinstance(error, OutOfMemory) and not operation.maybe_stored:
                self._fail(operation, self._capacity.out_of_memory())
            else:
                self._parked[operation] = None

    def _retain(self, shard: int, epoch: int, operations: list[Operation], answers: list[bytes]) -> None:
        retain(self._member.retention, shard, epoch, operations, answers)

    def _not_an_ack(self, operations: list[Operation]) -> None:
        """The answer came after its epoch ended here, or too late: it is asked for again, by id."""
        for operation in operations:
            operation.in_flight = False
            operation.maybe_stored = True
            operation.trouble = "the path has changed"
        self._parked.update(dict.fromkeys(operations))
        self._member.suspect()

    def _deliver_direct(self, operation: Operation, outcome: Outcome) -> None:
        self._finish(operation)
        self._answered += 1
        self._metrics.append_seconds.observe(self._loop.time() - operation.began)
        if isinstance(outcome, list):
            how = "duplicate" if outcome[0].duplicate else "acked"
            self._metrics.appends.inc(("direct", operation.level, how), len(outcome))
        if operation.future.done():
            return
        if isinstance(outcome, list):
            operation.future.set_result((0, outcome))
        else:
            operation.future.set_exception(outcome)

    def _lose_what_is_under_way(self, error: BufferError, *, never_sent: list[Call] | None = None) -> None:
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
        self._losses += 1
        self._put_back(lost)

    def _unpark(self, operations: list[Operation]) -> None:
        for operation in operations:
            self._parked.pop(operation, None)
        self._put_back(operations)

    def _put_back(self, operations: Sequence[Operation]) -> None:
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
            everything = itertools.chain(self._queue, self._parked, self._direct.everything(), *under_way)
            for operation in everything:
                if operation.began + operation.limit_seconds <= now:
                    operation.expire()
            if self._parked or self._reach.is_sought:
                self._unpark([op for op in self._parked if self._may_go_on(op)])
                self._to_send.set()

    def _may_go_on(self, operation: Operation) -> bool:
        """Given up by its caller, or the shard is open: a permit comes without a change of the path."""
        mode = self._member.states[operation.shard].mode
        return operation.future.done() or mode == "direct" or (mode == "stream" and self._member.permitted())


def _closing(operation: Operation | None = None) -> BufferError:
    if operation is not None and (operation.maybe_stored or operation.in_flight):
        text = "this process closed before Redis answered; repeat it with the same ids"
        return OutcomeUnknown(text, ids=operation.ids)
    return RedisUnavailable("this process is closing")
