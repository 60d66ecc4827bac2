"""How far each shard is flushed, as Redis tells, and waiting for it.

Marks arrive with append replies and over pub/sub; pub/sub may miss some, so while somebody waits the
marks are read again now and then.
"""

from __future__ import annotations

import asyncio
import heapq
import itertools
import logging
from collections.abc import Callable

import anyio

from buffer.errors import BufferError, RedisUnavailable
from buffer.model.position import epoch_of, pack, sequence_of
from buffer.stream.client import RedisClient
from buffer.stream.shards import Shards

_log = logging.getLogger(__name__)

_POLL_SECONDS = 0.1
_RESUBSCRIBE_SECONDS = 0.5


# Position, a number that keeps the heap from comparing futures, and who waits.
_Waiter = tuple[int, int, "asyncio.Future[None]"]


class Marks:
    """Flushed-through positions of all shards."""

    def __init__(self, client: RedisClient, shards: Shards) -> None:
        self._client = client
        self._shards = shards
        self._through = [(0, -1)] * len(shards.keys)  # epoch, sequence
        self._all_before = [0] * len(shards.keys)  # epoch
        self.on_mark: Callable[[int, int, int], None] = lambda *_: None
        self._waiters: list[list[_Waiter]] = [[] for _ in shards.keys]
        self._order = itertools.count()
        self._someone_waits = asyncio.Event()
        self._closed = False

    def update(self, shard: int, epoch: int, sequence: int) -> None:
        """Learn a mark. An older one changes nothing.

        It says nothing of positions of other epochs, so those who wait for one go on waiting.
        """
        self.on_mark(shard, epoch, sequence)  # also an old one: something may have been retained since
        if (epoch, sequence) <= self._through[shard]:
            return
        self._through[shard] = (epoch, sequence)
        self._release(shard, pack(epoch, 0), pack(epoch, sequence))

    def everything_before(self, shard: int, epoch: int) -> None:
        """Learn that nothing of older epochs is left outside of Postgres: a path was closed, and is clean."""
        if epoch > self._all_before[shard]:
            self._all_before[shard] = epoch
            self._release(shard, 0, pack(epoch, 0) - 1)

    def _release(self, shard: int, first: int, last: int) -> None:
        waiters = self._waiters[shard]
        others: list[_Waiter] = []
        while waiters and waiters[0][0] <= last:
            waiter = heapq.heappop(waiters)
            if waiter[0] < first:
                others.append(waiter)
            elif not waiter[2].done():
                waiter[2].set_result(None)
        for waiter in others:
            heapq.heappush(waiters, waiter)

    async def wait(self, shard: int, position: int) -> None:
        """Return once ``position`` of the shard is flushed; nudges whoever flushes it.

        Of an older epoch it says that nothing is left to wait for; whether the item is in Postgres, Postgres
        knows.

        Raises:
            RedisUnavailable: this process closes.
        """
        if self._reached(shard, position):
            return
        if self._closed:
            raise _closing()
        future: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        heapq.heappush(self._waiters[shard], (position, next(self._order), future))
        self._someone_waits.set()
        try:
            await self._shards.nudge(shard)
        except RedisUnavailable:
            _log.debug("nudge of shard %d failed; its flusher will come by itself", shard)
        await future

    def _reached(self, shard: int, position: int) -> bool:
        epoch, sequence = self._through[shard]
        if epoch_of(position) < self._all_before[shard]:
            return True
        return epoch_of(position) == epoch and sequence_of(position) <= sequence

    async def run(self) -> None:
        """Keep the marks fresh until cancelled; who waits then is told that nobody will tell."""
        try:
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(self._listen, name="marks-listen")
                tasks.start_soon(self._poll, name="marks-poll")
        finally:
            self._closed = True
            for _, _, future in itertools.chain(*self._waiters):
                if not future.done():
                    future.set_exception(_closing())

    async def _listen(self) -> None:
        _, flushed = self._shards.channels
        while True:
            try:
                async for message in self._client.messages(flushed):
                    if message is not None:
                        self.update(*map(int, message[1].split()))
            except BufferError as error:
                _log.debug("no flush notices: %s", error)
            await asyncio.sleep(_RESUBSCRIBE_SECONDS)

    async def _poll(self) -> None:
        while True:
            await self._someone_waits.wait()
            await asyncio.sleep(_POLL_SECONDS)
            waited_for = self._waited_for()
            if not waited_for:
                self._someone_waits.clear()
                continue
            try:
                for shard, mark in zip(waited_for, await self._shards.marks(waited_for), strict=True):
                    self.update(shard, *mark)
                # A nudge is lost where nobody listens: the flusher reconnects, or the shard changes hands.
                await self._shards.nudge(*waited_for)
            except BufferError as error:
                _log.debug("no marks: %s", error)

    def _waited_for(self) -> list[int]:
        """Shards that somebody still waits for; those who gave up are forgotten."""
        for waiters in self._waiters:
            if any(future.done() for _, _, future in waiters):
                waiters[:] = [waiter for waiter in waiters if not waiter[2].done()]
                heapq.heapify(waiters)
        return [shard for shard, waiters in enumerate(self._waiters) if waiters]


def _closing() -> RedisUnavailable:
    return RedisUnavailable("this process is closing")
