"""From items to receipts: checks what comes in, hands it to the coalescer, says what became of it."""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, NoReturn, get_args

from buffer.append.coalescer import Coalescer, Operation
from buffer.errors import (
    BufferError,
    Conflict,
    InvalidRequest,
    OutcomeUnknown,
    PreconditionFailed,
    RedisUnavailable,
    TooLarge,
)
from buffer.metrics import Metrics
from buffer.model.codec import body_digest, encode_item
from buffer.model.ids import check_id, id_digest, make_item_id, shard_of
from buffer.model.position import MAX_POSITION, pack
from buffer.model.record import encode_header
from buffer.model.types import Level, Receipt
from buffer.settings import Settings
from buffer.store.items import ItemReader
from buffer.stream.marks import Marks
from buffer.stream.shards import Shards

_LEASE_SECONDS = 5.0
_SUPPORTED_LEVELS: tuple[Level, ...] = ("buffered", "stored")


class Appender:
    """Appends of this process."""

    def __init__(
        self,
        settings: Settings,
        coalescer: Coalescer,
        shards: Shards,
        marks: Marks,
        items: ItemReader,
        metrics: Metrics,
    ) -> None:
        self._settings = settings
        self._coalescer = coalescer
        self._shards = shards
        self._marks = marks
        self._items = items
        self._metrics = metrics

    async def append(
        self,
        tenant: str,
        conversation: str,
        items: Sequence[Any],
        *,
        ids: Sequence[str | None] | None = None,
        user: str | None = None,
        durability: Level = "buffered",
        if_match: int | None = None,
        replace_after: int | None = None,
        timeout: float | None = None,
    ) -> list[Receipt]:
        """Append all items or none; one receipt an item, in order.

        ``tenant``, ``conversation`` and ``user`` are checked already. ``if_match`` is the conversation's
        last position, 0 for "no items yet". ``replace_after`` removes the items after that position.
        ``timeout`` is in seconds.

        Raises:
            InvalidRequest, TooLarge: the request breaks a rule; nothing was stored.
            Conflict: an id is known with another body, or only a part of the batch is known.
            PreconditionFailed: ``if_match`` is not the last position.
            Unavailable: nothing was stored; try again.
            OutcomeUnknown: it may be stored, or has not reached its level; repeat it with the same ids.
        """
        began = time.perf_counter()
        _check_options(durability, if_match)
        key = f"{tenant}/{conversation}"
        item_ids, operation = self._operation(key, items, ids, user, if_match, replace_after)
        limit = timeout if timeout is not None else self._settings.append_timeout_seconds
        try:
            try:
                async with asyncio.timeout(limit):
                    receipts = await self._buffered(tenant, conversation, key, item_ids, operation)
            except TimeoutError:
                self._not_in_time(operation, item_ids, limit)
            if durability == "stored":
                receipts = await self._stored(operation.shard, receipts, limit - (time.perf_counter() - began))
        except BufferError as error:
            self._metrics.append_failed(durability, error)
            raise
        self._metrics.appended(durability, len(receipts), receipts[0].duplicate, time.perf_counter() - began)
        return receipts

    def _operation(
        self,
        key: str,
        items: Sequence[Any],
        ids: Sequence[str | None] | None,
        user: str | None,
        if_match: int | None,
        replace_after: int | None,
    ) -> tuple[list[str], Operation]:
        settings = self._settings
        count = len(items)
        if not 1 <= count <= settings.max_batch_items:
            raise TooLarge(
                f"items holds {count}; one append takes 1 to {settings.max_batch_items} (max_batch_items)",
                param="items",
            )
        if ids is not None and len(ids) != count:
            raise InvalidRequest(f"ids holds {len(ids)} for {count} items", param="ids")
        now_ms = time.time_ns() // 1_000_000
        item_ids: list[str] = []
        arguments: list[bytes] = []
        nbytes = 0
        for index, item in enumerate(items):
            payload = encode_item(item, f"items[{index}]", settings.max_item_bytes)
            item_id = _item_id(item, ids[index] if ids is not None else None, index)
            item_ids.append(item_id)
            nbytes += len(payload)
            arguments += (
                id_digest(key, item_id),
                body_digest(item, payload),
                encode_header(
                    key,
                    item_id,
                    user,
                    now_ms,
                    replace_after if index == 0 else None,
                    batch_continues=index + 1 < count,
                ),
                payload,
            )
        if nbytes > settings.max_batch_bytes:
            raise TooLarge(
                f"items are {nbytes} bytes of JSON; the limit is {settings.max_batch_bytes} (max_batch_bytes)",
                param="items",
            )
        if count > 1 and len(set(item_ids)) < count:
            raise InvalidRequest("two items of the batch have the same id", param="ids")
        return item_ids, Operation(shard_of(key, settings.shards), key, arguments, nbytes, if_match)

    async def _buffered(
        self, tenant: str, conversation: str, key: str, item_ids: list[str], operation: Operation
    ) -> list[Receipt]:
        while True:
            epoch, answer = await self._coalescer.submit(operation)
            kind = answer[:1]
            if kind.isdigit():
                first = pack(epoch, int(answer))
                return [Receipt(item_id, first + i, "buffered") for i, item_id in enumerate(item_ids)]
            if kind == b"d":
                positions = [pack(epoch, int(sequence)) for sequence in answer[1:].split(b",")]
                return [
                    Receipt(item_id, position, "buffered", duplicate=True)
                    for item_id, position in zip(item_ids, positions, strict=True)
                ]
            if kind == b"c":
                self._conflict(item_ids, answer)
            if kind == b"p":
                last = pack(epoch, int(answer[1:]))
                raise PreconditionFailed(
                    f"the last position is {last}, not {operation.expected}", last_position=last
                )
            operation = await self._confirm_last(tenant, conversation, key, epoch, operation)

    async def _confirm_last(
        self, tenant: str, conversation: str, key: str, epoch: int, operation: Operation
    ) -> Operation:
        """Compare ``if_match`` with Postgres, under a lease that any flush of the conversation ends."""
        token = os.urandom(8)
        unflushed = await self._shards.lease(operation.shard, epoch, key, token, _LEASE_SECONDS)
        if unflushed is None:
            last = await self._items.last_position(tenant, conversation) or 0
            if last != operation.expected:
                raise PreconditionFailed(
                    f"the last position is {last}, not {operation.expected}", last_position=last
                )
        again = Operation(operation.shard, key, operation.arguments, operation.nbytes, operation.expected)
        again.token = token
        again.maybe_stored = operation.maybe_stored
        return again

    async def _stored(self, shard: int, receipts: list[Receipt], seconds: float) -> list[Receipt]:
        try:
            async with asyncio.timeout(max(0.0, seconds)):
                await self.flushed(shard, receipts[-1].position)
        except TimeoutError as error:
            raise OutcomeUnknown(
                "buffered, and not yet in Postgres within the time limit",
                ids=[receipt.id for receipt in receipts],
                level="buffered",
            ) from error
        return [replace(receipt, level="stored") for receipt in receipts]

    async def flushed(self, shard: int, position: int) -> None:
        """Return once everything of the shard up to ``position`` is committed in Postgres."""
        await self._marks.wait(shard, position)

    @staticmethod
    def _conflict(item_ids: list[str], answer: bytes) -> NoReturn:
        if len(answer) > 1:
            clashing = [item_ids[int(i) - 1] for i in answer[1:].split(b",")]
            raise Conflict(f"known with another body: {', '.join(clashing)}", ids=clashing)
        raise Conflict("a part of this batch is known already, under the same ids", ids=item_ids)

    @staticmethod
    def _not_in_time(operation: Operation, item_ids: list[str], limit: float) -> NoReturn:
        if operation.maybe_stored or operation.in_flight:
            raise OutcomeUnknown(
                f"no answer from Redis within {limit:g} s; repeat it with the same ids", ids=item_ids
            )
        raise RedisUnavailable(f"Redis did not take the append within {limit:g} s", retry_after=1.0)


def _check_options(durability: str, if_match: int | None) -> None:
    if durability not in _SUPPORTED_LEVELS:
        known = ", ".join(_SUPPORTED_LEVELS)
        what = "not supported yet" if durability in get_args(Level) else "not a level"
        raise InvalidRequest(f"durability {durability!r} is {what}; use one of {known}", param="durability")
    if if_match is not None and not (isinstance(if_match, int) and 0 <= if_match <= MAX_POSITION):
        raise InvalidRequest("if_match must be a position, or 0 for no items", param="if_match")


def _item_id(item: dict[str, Any], given: str | None, index: int) -> str:
    """The id that the caller named, the item's own, or a new one."""
    own = item.get("id")
    if given is None and own is None:
        return make_item_id(item)
    if given is not None and own is not None and given != own:
        raise InvalidRequest(
            f"items[{index}] has id {own!r} in its body and {given!r} beside it", param=f"items[{index}].id"
        )
    return check_id(given if given is not None else own, f"items[{index}].id")


