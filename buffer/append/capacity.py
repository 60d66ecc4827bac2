"""Whether there is room for more: in Redis, and in this process for what it must retain.

Above a high-water mark appends are refused before anything is taken, until the low one is reached. They
are never sent to Postgres instead: while Redis lives, that would be two paths at a time.

Cached views make way before that: near the mark of Redis's memory no process adds to them, and flushers
sweep them out.
"""

from __future__ import annotations

import asyncio
import logging
import math
import time
from typing import Any

from buffer.errors import BufferError, Overloaded
from buffer.metrics import Metrics
from buffer.path.member import Member
from buffer.policy.watermarks import Flow, Gate, retry_after, seconds_to_full
from buffer.settings import Settings
from buffer.stream.client import RedisClient
from buffer.stream.shards import Shards

_log = logging.getLogger(__name__)

_LOOK_SECONDS = 0.25
# Views make way from the first share of the high-water mark of memory on, until the second is reached. At
# the low one of the mark itself appends are taken again, so it must be above.
_CROWDED_SHARE = 0.9
_ROOMY_SHARE = 0.85


class Capacity:
    """The three marks: unflushed bytes, Redis's memory, retained bytes."""

    def __init__(
        self, settings: Settings, client: RedisClient, shards: Shards, member: Member, metrics: Metrics
    ) -> None:
        low = settings.low_water_share
        self._memory_share = settings.high_water_memory_share
        self._client = client
        self._shards = shards
        self._member = member
        self._metrics = metrics
        self._unflushed = Gate(settings.high_water_bytes, low * settings.high_water_bytes)
        self._memory = Gate(math.inf, math.inf)
        self._crowd = Gate(math.inf, math.inf)
        self._retained = Gate(settings.retained_max_bytes, low * settings.retained_max_bytes)
        self._flow = Flow()
        self._used = 0.0
        self._used_memory = 0.0
        self._granted = 0
        self._full = False

    @property
    def crowded(self) -> bool:
        """Whether Redis is so full that views must make way for what is not flushed."""
        return self._crowd.closed

    def views_may_grow(self, nbytes: int) -> bool:
        """Whether views may grow by so much; what is granted counts until the next look at Redis."""
        if self.crowded or self._used_memory + self._granted + nbytes >= self._crowd.high:
            return False
        self._granted += nbytes
        return True

    def check(self) -> None:
        """Refuse an append for which there is no room.

        Raises:
            Overloaded: with the time until there will be.
        """
        retained = self._member.retention.bytes
        if self._retained.see(retained):
            raise self._refusal(
                f"this process retains {retained} bytes until they are in Postgres; "
                f"the limit is {self._retained.high:.0f} (retained_max_bytes)",
                retained - self._retained.low,
            )
        if self._unflushed.closed:
            raise self._refusal(
                f"{self._used:.0f} bytes wait for Postgres; "
                f"the limit is {self._unflushed.high:.0f} (high_water_bytes)",
                self._used - self._unflushed.low,
            )
        if self._memory.closed or self._full:
            raise self.out_of_memory()

    def out_of_memory(self) -> Overloaded:
        """Redis is full, or nearly: what an append that it refused gets."""
        if not self._full:
            self._full = True  # until the next look
        text = (
            f"Redis uses {self._used_memory:.0f} bytes; the limit is {self._memory.high:.0f} "
            "(high_water_memory_share of its maxmemory)"
            if self._memory.closed
            else "Redis is out of memory (maxmemory)"
        )
        return self._refusal(text, max(self._used_memory - self._memory.low, self._used / 2))

    def _refusal(self, text: str, over: float) -> Overloaded:
        return Overloaded(text, retry_after=round(retry_after(over, 0, self._flow.drain), 2))

    async def run(self) -> None:
        """Look at Redis now and then until cancelled."""
        while True:
            try:
                await self._look()
            except BufferError as error:
                _log.debug("room in Redis is not known: %s", error)
            await asyncio.sleep(_LOOK_SECONDS)

    async def _memory_info(self) -> dict[str, Any]:
        """Empty where Redis does not tell."""
        try:
            return await self._client.info("memory")
        except BufferError as error:
            _log.debug("Redis does not tell its memory: %s", error)
            return {}

    async def _look(self) -> None:
        streams = [shard for shard, state in enumerate(self._member.states) if state.mode == "stream"]
        if not streams:
            self._full = self._unflushed.closed = self._memory.closed = self._crowd.closed = False
            self._metrics["seconds_to_full"].set(math.inf)
            return
        backlogs = await self._shards.peek(streams)
        self._used = sum(backlog.bytes for backlog in backlogs)
        settled = sum(backlog.settled_bytes for backlog in backlogs)
        self._flow.see(self._used + settled, settled, time.monotonic())
        self._unflushed.see(self._used)
        info = await self._memory_info()
        self._used_memory, limit = info.get("used_memory", 0), info.get("maxmemory", 0)
        high = limit * self._memory_share if limit else math.inf
        self._memory.high, self._memory.low = high, high - (limit * self._memory_share * 0.1 if limit else 0)
        self._full = self._memory.see(self._used_memory)
        self._crowd.high, self._crowd.low = _CROWDED_SHARE * high, _ROOMY_SHARE * high
        self._crowd.see(self._used_memory)
        self._granted = 0
        self._metrics["redis_memory_bytes"].set(self._used_memory)
        self._metrics["seconds_to_full"].set(
            min(
                seconds_to_full(self._used, self._unflushed.high, self._flow),
                seconds_to_full(self._used_memory, high, self._flow),
                seconds_to_full(self._member.retention.bytes, self._retained.high, self._flow),
            )
        )
