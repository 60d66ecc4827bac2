"""Whether this process can reach Redis, and waiting for it.

A Redis that is lost is lost for all, and the path changes; or for this process alone, and then nobody
should wait here. Neither is worth a time-out a request.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Coroutine, Sequence
from typing import TYPE_CHECKING, Any

from buffer.errors import RedisUnavailable

if TYPE_CHECKING:
    from buffer.path.member import State

# A switch of the path takes once or twice redis_lost_seconds; if none came by then, we are alone.
_ALONE_AFTER = 3


class Reach:
    """What the append and read paths of one process know about their way to Redis."""

    def __init__(self, states: Sequence[State], redis_lost_seconds: float) -> None:
        self._states = states
        self._alone_seconds = _ALONE_AFTER * redis_lost_seconds
        self._lost_since: float | None = None
        self._waiting: set[asyncio.Task[None]] = set()

    def lost(self) -> None:
        """Redis was not reached."""
        if self._lost_since is None:
            self._lost_since = time.monotonic()

    def found(self) -> None:
        """Redis was reached."""
        self._lost_since = None

    def path_changed(self) -> None:
        """Others have lost it, too; or it is another one now. Who waits for the one before need not."""
        self._lost_since = None
        for task in self._waiting:
            task.cancel()

    @property
    def is_sought(self) -> bool:
        """Whether Redis is out of reach, and the service has not given it up."""
        return self._lost_since is not None and any(state.mode == "stream" for state in self._states)

    def refuse_if_alone(self, shard: int) -> None:
        """While the service may still switch, appends and reads wait; if it does not, it has Redis.

        Raises:
            RedisUnavailable: try another process.
        """
        if self._lost_since is None or self._states[shard].mode != "stream":
            return
        if time.monotonic() - self._lost_since > self._alone_seconds:
            raise RedisUnavailable("this process has lost Redis, and the service has not", retry_after=1.0)

    async def wait(self, waiting: Coroutine[Any, Any, None]) -> bool:
        """Wait for Redis until the path changes: what goes to Postgres then must not wait, too.

        Whether it came to its end; its error is raised.
        """
        task = asyncio.create_task(waiting, name="wait-for-redis")
        self._waiting.add(task)
        try:
            await asyncio.wait([task])
        finally:
            self._waiting.discard(task)
            task.cancel()
        if task.cancelled():
            return False
        task.result()
        return True
