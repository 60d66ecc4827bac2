"""What a follower hands to one listener: a bounded queue that tells when it began and why it ended."""

from __future__ import annotations

import asyncio
from collections import deque

import anyio

from buffer.model.record import Record


class Subscription:
    """Entries of one conversation, from `start` to `end`, without a gap."""

    __slots__ = ("_changed", "_entries", "_most", "ended", "key", "overflowed", "started")

    def __init__(self, key: bytes, most: int) -> None:
        self.key = key
        self.started = False
        self.ended = False
        self.overflowed = False
        self._most = most
        self._entries: deque[tuple[int, Record]] = deque()
        self._changed = asyncio.Event()

    # --- the follower's side: nothing here waits

    def start(self) -> None:
        """Everything from now on will be put."""
        self.started = True
        self._changed.set()

    def put(self, position: int, record: Record) -> None:
        """Queue an entry; one too many ends the subscription."""
        if len(self._entries) >= self._most:
            self.overflowed = True
            self.end()
            return
        self._entries.append((position, record))
        self._changed.set()

    def end(self) -> None:
        """Nothing more will be put; what is queued can still be taken."""
        self.ended = True
        self._changed.set()

    # --- the listener's side

    async def wait_until_started(self, seconds: float) -> bool:
        """Whether it has started, within the time; it returns early if it has ended."""
        with anyio.move_on_after(seconds):
            while not (self.started or self.ended):
                self._changed.clear()
                await self._changed.wait()
        return self.started and not self.ended

    async def take(self) -> tuple[int, Record] | None:
        """The next entry with its position; None when it has ended and everything was taken."""
        while not self._entries:
            if self.ended:
                return None
            self._changed.clear()
            await self._changed.wait()
        return self._entries.popleft()
