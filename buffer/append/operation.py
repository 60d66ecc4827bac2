"""One append on its way to Redis."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

import msgspec
from msgspec import structs

from buffer.errors import OutcomeUnknown, RedisUnavailable
from buffer.model.types import Level


class Operation(msgspec.Struct, eq=False, gc=False):
    """Items of one conversation, taken whole or not at all.

    ``maybe_stored`` and ``in_flight`` keep what is certain if the caller gives up: an operation that was
    never sent will never be stored; one that was sent and not answered is unknown.
    """

    shard: int
    conversation: bytes  # tenant/conversation
    ids: Sequence[str]
    arguments: list[bytes]  # four an item: id digest, body digest, header, payload
    nbytes: int
    expected: int | None  # last position, 0 for "no items", None for any
    level: Level
    limit_seconds: float
    began: float  # the loop's time
    future: asyncio.Future[tuple[int, bytes]]
    token: bytes = b""  # lease under which ``expected`` was confirmed in Postgres
    in_flight: bool = False
    maybe_stored: bool = False
    trouble: str = ""  # why the last attempt did not succeed

    def confirmed(self, token: bytes) -> Operation:
        """The same operation once more, now that Postgres confirmed ``expected`` under a lease."""
        future = self.future.get_loop().create_future()
        return structs.replace(self, token=token, future=future, in_flight=False)

    def expire(self) -> None:
        """Tell the caller that its time is up."""
        if self.future.done():
            return
        within = f"within {self.limit_seconds:g} s" + (f" ({self.trouble})" if self.trouble else "")
        if self.maybe_stored or self.in_flight:
            text = f"no answer from Redis {within}; repeat it with the same ids"
            self.future.set_exception(OutcomeUnknown(text, ids=self.ids))
        else:
            text = f"Redis did not take the append {within}"
            self.future.set_exception(RedisUnavailable(text, retry_after=1.0))
