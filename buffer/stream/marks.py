"""How far each shard is flushed, as Redis tells, and waiting for it.

Marks arrive with append replies and over pub/sub; pub/sub may miss some, so while somebody waits the
marks are read again now and then.
"""

from __future__ import annotations

import asyncio
import heapq
import itertools
import logging

from buffer.errors import BufferError, RedisUnavailable
from buffer.model.position import epoch_of, pack
from buffer.stream.client import RedisClient
from buffer.stream.shards import Shards

_log = logging.getLogger(__name__)

_POLL_SECONDS = 0.1
_RESUBSCRIBE_SECONDS = 0.5


class Marks:
    """Flushed-through positions of all shards."""

    def __init__(self, client: RedisClient, shards: Shards) -> None:
        self._client = client
        self._shards = shards
        self._through = [0] * len(shards.keys)
        self._waiters: list[list[tuple[int, int, asyncio.Future[None]]]] = [[] for _ in shards.keys]
        self._order = itertools.count()
        self._someone_waits = asyncio.Event()
        self._closed = False

    def through(self, shard: int) -> int:
        """The last position that is known to be flushed."""
        return self._through[shard]

    def update(self, shard: int, epoch: int, sequence: int) -> None:
        """Learn a mark. An older one of the same epoch changes nothing."""
        through = pack(epoch, sequence)
        if through <= self._through[shard]:
            return
        self._through[shard] = through
        waiters = self._waiters[shard]
        while waiters and waiters[0][0] <= through:
            _, _, future = heapq.heappop(waiters)
            if not future.done():
                future.set_result(None)

    async def wait(self, shard: int, position: int) -> None:
        """Return once ``position`` of the shard is flushed; nudges whoever flushes it.

        A mark releases only waiters of its own epoch: what became of an older one, it does not say.

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
        return position <= self._through[shard] and epoch_of(position) == epoch_of(self._through[shard])

    async def run(self) -> None:
        """Keep the marks fresh until cancelled; who waits then is told that nobody will tell."""
        try:
            async with asyncio.TaskGroup() as tasks:
                tasks.create_task(self._listen(), name="marks-listen")
                tasks.create_task(self._poll(), name="marks-poll")
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
