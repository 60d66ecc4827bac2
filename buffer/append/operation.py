"""One append on its way to Redis."""

from __future__ import annotations

import asyncio

from buffer.errors import OutcomeUnknown, RedisUnavailable


class Operation:
    """Items of one conversation, taken whole or not at all.

    ``maybe_stored`` and ``in_flight`` keep what is certain if the caller gives up: an operation that was
    never sent will never be stored; one that was sent and not answered is unknown.
    """

    __slots__ = (
        "arguments",
        "began",
        "conversation",
        "expected",
        "future",
        "ids",
        "in_flight",
        "limit_seconds",
        "maybe_stored",
        "nbytes",
        "shard",
        "token",
    )

    def __init__(
        self,
        shard: int,
        conversation: bytes,
        ids: list[str],
        arguments: list[bytes],
        nbytes: int,
        expected: int | None,
        limit_seconds: float,
        loop: asyncio.AbstractEventLoop,
    ) -> None:
        self.shard = shard
        self.conversation = conversation  # tenant/conversation
        self.ids = ids
        self.arguments = arguments  # four an item: id digest, body digest, header, payload
        self.nbytes = nbytes
        self.expected = expected  # last position, 0 for "no items", None for any
        self.limit_seconds = limit_seconds
        self.began = loop.time()
        self.future: asyncio.Future[tuple[int, bytes]] = loop.create_future()
        self.token = b""  # lease under which ``expected`` was confirmed in Postgres
        self.in_flight = False
        self.maybe_stored = False

    def confirmed(self, token: bytes, loop: asyncio.AbstractEventLoop) -> Operation:
        """The same operation once more, now that Postgres confirmed ``expected`` under a lease."""
        again = Operation(
            self.shard,
            self.conversation,
            self.ids,
            self.arguments,
            self.nbytes,
            self.expected,
            self.limit_seconds,
            loop,
        )
        again.began = self.began
        again.token = token
        again.maybe_stored = self.maybe_stored
        return again

    def expire(self) -> None:
        """Tell the caller that its time is up."""
        if self.future.done():
            return
        if self.maybe_stored or self.in_flight:
            text = f"no answer from Redis within {self.limit_seconds:g} s; repeat it with the same ids"
            self.future.set_exception(OutcomeUnknown(text, ids=self.ids))
        else:
            text = f"Redis did not take the append within {self.limit_seconds:g} s"
            self.future.set_exception(RedisUnavailable(text, retry_after=1.0))
