"""One append on its way to Redis."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

import msgspec
from msgspec import structs

from buffer.errors import OutcomeUnknown, RedisUnavailable
from buffer.model.record import ITEM
from buffer.model.types import Level, Receipt

# Of Redis: the epoch and the script's answer. Of Postgres: the epoch and the receipts.
Answer = tuple[int, bytes | list[Receipt]]


class Operation(msgspec.Struct, eq=False, gc=False):
    """Items of one conversation, taken whole or not at all.

    ``maybe_stored`` (by an earlier attempt) and ``in_flight`` (by this one) keep what is certain if the
    caller gives up: an operation that was never sent will never be stored; one that was sent and not
    answered is unknown.
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
    future: asyncio.Future[Answer]
    fresh: bool = False  # every id was made here, for this append
    kind: str = ITEM  # what its entries are
    token: bytes = b""  # lease under which ``expected`` was confirmed in Postgres
    in_flight: bool = False
    maybe_stored: bool = False
    looked_up_in: int = 0  # the epoch in which Postgres did not know the ids
    mismatch: int | None = None  # what Postgres said is the last position, instead of ``expected``
    reached: Level | None = None  # the level that is certain, if it is not the one that was asked for
    trouble: str = ""  # why the last attempt did not succeed

    def again(self, token: bytes, mismatch: int | None) -> Operation:
        """The same operation once more, with what Postgres said of the last position under a lease."""
        future = self.future.get_loop().create_future()
        return structs.replace(self, token=token, mismatch=mismatch, future=future, in_flight=False)

    def expire(self) -> None:
        """Tell the caller that its time is up."""
        if self.future.done():
            return
        within = f"within {self.limit_seconds:g} s" + (f" ({self.trouble})" if self.trouble else "")
        if self.maybe_stored or self.in_flight:
            text = f"no certain answer {within}; repeat it with the same ids"
            self.future.set_exception(OutcomeUnknown(text, ids=self.ids, level=self.reached))
        else:
            text = f"the append was not taken {within}"
            self.future.set_exception(RedisUnavailable(text, retry_after=1.0))
