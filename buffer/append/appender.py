"""From items to receipts: checks what comes in, hands it to the coalescer, says what became of it."""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Mapping, Sequence
from typing import Any, get_args

from msgspec import structs

from buffer.append.coalescer import Coalescer
from buffer.append.operation import Operation
from buffer.append.replicated import Replicated
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
from buffer.model.ids import check_id, conversation_key, id_digest, make_item_id, shard_of, uuid7_hex
from buffer.model.position import MAX_POSITION, epoch_of, pack
from buffer.model.record import ITEM, encode_header
from buffer.model.types import Level, Receipt
from buffer.path.member import Member
from buffer.settings import MOST_BATCH_ITEMS, Settings
from buffer.store.items import ItemReader
from buffer.stream.marks import Marks
from buffer.stream.shards import Shards

# Names of the items in errors; made once, because every append needs one.
_PARAMS = [f"items[{index}]" for index in range(MOST_BATCH_ITEMS)]
_SUPPORTED_LEVELS: tuple[Level, ...] = ("buffered", "replicated", "stored")


class Target:
    """A conversation as the append path wants it. Tenant, conversation and user are checked already."""

    __slots__ = ("conversation", "key", "key_bytes", "shard", "tenant", "user")

    def __init__(self, tenant: str, conversation: str, user: str | None, shards: int) -> None:
        self.tenant = tenant
        self.conversation = conversation
        self.user = user
        self.key = conversation_key(tenant, conversation)
        self.key_bytes = self.key.encode()
        self.shard = shard_of(self.key, shards)


class Appender:
    """Appends of this process."""

    def __init__(
        self,
        settings: Settings,
        coalescer: Coalescer,
        replicated: Replicated,
        shards: Shards,
        marks: Marks,
        items: ItemReader,
        member: Member,
        metrics: Metrics,
    ) -> None:
        self._settings = settings
        self._coalescer = coalescer
        self._replicated = replicated
        self._shards = shards
        self._marks = marks
        self._items = items
        self._member = member
        self._metrics = metrics
        self._loop = asyncio.get_running_loop()

    async def append(
        self,
        target: Target,
        items: Sequence[Any],
        ids: Sequence[str | None] | None,
        durability: Level,
        if_match: int | None,
        replace_after: int | None,
        timeout: float | None,
    ) -> list[Receipt]:
        """Append all items or none; one receipt an item, in order.

        See `buffer.app.conversation.Conversation.extend`, except that ``replace_after`` is a position.
        """
        try:
            if durability != "buffered" or if_match is not None:
                _check_options(durability, if_match)
            operation = self._operation(target, items, ids, durability, if_match, replace_after, timeout)
            receipts = await self._taken(target, operation)
            if durability == "replicated" and receipts[0].level == "buffered":
                receipts = [structs.replace(receipt, level="replicated") for receipt in receipts]
            if durability == "stored" and receipts[0].level != "stored":
                receipts = await self._stored(operation, receipts)
        except BufferError as error:
            self._metrics.append_failed(durability, error)
            raise
        return receipts

    async def remove(
        self,
        target: Target,
        kind: str,
        item_id: str,
        position: int | None,
        *,
        expected: int | None = None,
        timeout: float | None = None,
    ) -> Receipt:
        """Delete the item at ``position``, or erase everything so far; it is in Postgres on return.

        Args:
            target: the conversation.
            kind: `buffer.model.record.DELETE` or ``ERASE``.
            item_id: of the item; for an erasure anything.
            position: of the item; for an erasure None.
            expected: the conversation's last position, or None for any.
            timeout: in seconds.

        Raises:
            PreconditionFailed: ``expected`` is not the last position; nothing was removed.
            Unavailable: nothing was removed.
            OutcomeUnknown: it may be removed, or may become so.
        """
        operation_id = f"{kind}_{uuid7_hex()}"
        header = encode_header(
            target.key, item_id, target.user, time.time_ns() // 1_000_000, position, False, kind
        )
        operation = Operation(
            target.shard,
            target.key_bytes,
            [operation_id],
            [id_digest(target.key, operation_id), bytes(8), header, b""],
            0,
            expected,
            "stored",
            self._settings.append_timeout_seconds if timeout is None else timeout,
            self._loop.time(),
            self._loop.create_future(),
            fresh=True,
            kind=kind,
        )
        await self._items.check_reachable()
        receipts = await self._taken(target, operation)
        if receipts[0].level != "stored":
            receipts = await self._stored(operation, receipts)
        return receipts[0]

    async def _taken(self, target: Target, operation: Operation) -> list[Receipt]:
        """The receipts, once a store took the operation."""
        coalescer = self._replicated if operation.level == "replicated" else self._coalescer
        try:
            epoch, answer = await coalescer.submit(operation)
            while answer == b"l":
                # The ids are looked for once more: an earlier attempt may be what Postgres found last.
                if operation.mismatch is not None:
                    raise _precondition(operation, operation.mismatch)
                operation = await self._confirm_last(target, epoch, operation)
                epoch, answer = await coalescer.submit(operation)
            return answer if isinstance(answer, list) else _receipts(operation, epoch, answer)
        except PreconditionFailed as error:
            if operation.kind != ITEM and operation.maybe_stored:
                # Postgres keeps no id of a removal: the last position may be that of an earlier attempt.
                text = f"an earlier attempt had no certain answer, and {error}"
                raise OutcomeUnknown(text, ids=operation.ids) from error
            raise

    def _operation(
        self,
        target: Target,
        items: Sequence[Any],
        ids: Sequence[str | None] | None,
        durability: Level,
        if_match: int | None,
        replace_after: int | None,
        timeout: float | None,
    ) -> Operation:
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
        fresh = True
        arguments: list[bytes] = []
        nbytes = 0
        key, most_bytes = target.key, settings.max_item_bytes
        for index, item in enumerate(items):
            payload = encode_item(item, _PARAMS[index], most_bytes)
            item_id = ids[index] if ids is not None else None
            if item_id is not None or "id" in item:
                fresh = False
                item_id = _given_id(item, item_id, index)
            else:
                item_id = make_item_id(item)
            item_ids.append(item_id)
            nbytes += len(payload)
            cut = replace_after if index == 0 else None
            header = encode_header(key, item_id, target.user, now_ms, cut, index + 1 < count)
            arguments += (id_digest(key, item_id), body_digest(item, payload), header, payload)
        if nbytes > settings.max_batch_bytes:
            raise TooLarge(
                f"items are {nbytes} bytes; the limit is {settings.max_batch_bytes} (max_batch_bytes)",
                param="items",
            )
        if count > 1 and len(set(item_ids)) < count:
            raise InvalidRequest("two items of the batch have the same id", param="ids")
        limit = settings.append_timeout_seconds if timeout is None else timeout
        loop = self._loop
        return Operation(
            target.shard,
            target.key_bytes,
            item_ids,
            arguments,
            nbytes,
            if_match,
            durability,
            limit,
            loop.time(),
            loop.create_future(),
            fresh,
        )

    async def _confirm_last(self, target: Target, epoch: int, operation: Operation) -> Operation:
        """Compare ``if_match`` with Postgres, under a lease that any flush of the conversation ends."""
        token = await self._shards.lease(target.shard, epoch, target.key, os.urandom(8))
        if token is not None:
            last = await self._items.last_position(target.tenant, target.conversation) or 0
            if last != operation.expected:
                return operation.again(b"", last)
        return operation.again(token or b"", None)

    async def _stored(self, operation: Operation, receipts: list[Receipt]) -> list[Receipt]:
        seconds = operation.began + operation.limit_seconds - self._loop.time()
        try:
            async with asyncio.timeout(max(0.0, seconds)):
                await self.flushed(operation.shard, receipts[-1].position)
                if not await self._is_stored(operation, receipts):
                    raise RedisUnavailable("the path has changed, and Postgres does not have it")  # noqa: TRY301
        except (TimeoutError, RedisUnavailable) as error:
            why = str(error) or f"not in Postgres within {operation.limit_seconds:g} s"
            raise OutcomeUnknown(f"buffered, and {why}", ids=operation.ids, level="buffered") from error
        return [structs.replace(receipt, level="stored") for receipt in receipts]

    async def _is_stored(self, operation: Operation, receipts: list[Receipt]) -> bool:
        """A mark speaks for its own epoch; where the path has changed since, Postgres has the last word."""
        state = self._member.states[operation.shard]
        if state.at(epoch_of(receipts[-1].position), "stream"):
            return True
        tenant, conversation = operation.conversation.decode().split("/")
        if operation.kind != ITEM:
            return await self._items.was_removed(tenant, conversation, receipts[-1].position)
        stored = await self._items.positions(tenant, conversation, operation.ids)
        return all(receipt.id in stored and stored[receipt.id][0] == receipt.position for receipt in receipts)

    async def flushed(self, shard: int, position: int) -> None:
        """Return once everything of the shard up to ``position`` is committed in Postgres."""
        await self._marks.wait(shard, position)


def _receipts(operation: Operation, epoch: int, answer: bytes) -> list[Receipt]:
    """What the append script's answer means."""
    ids, kind = operation.ids, answer[:1]
    if kind.isdigit():
        first = pack(epoch, int(answer))
        if len(ids) == 1:
            return [Receipt(ids[0], first, "buffered")]
        return [Receipt(item_id, first + i, "buffered") for i, item_id in enumerate(ids)]
    if kind == b"d":
        sequences = map(int, answer[1:].split(b","))
        return [
            Receipt(item_id, pack(epoch, sequence), "buffered", duplicate=True)
            for item_id, sequence in zip(ids, sequences, strict=True)
        ]
    if kind == b"p":
        raise _precondition(operation, pack(epoch, int(answer[1:])))
    if len(answer) > 1:
        clashing = [ids[int(i) - 1] for i in answer[1:].split(b",")]
        raise Conflict(f"known with another body: {', '.join(clashing)}", ids=clashing)
    raise Conflict("a part of this batch is known already, under the same ids", ids=ids)


def _precondition(operation: Operation, last: int) -> PreconditionFailed:
    return PreconditionFailed(f"the last position is {last}, not {operation.expected}", last_position=last)


def _check_options(durability: str, if_match: int | None) -> None:
    if durability not in _SUPPORTED_LEVELS:
        known = ", ".join(_SUPPORTED_LEVELS)
        what = "not supported yet" if durability in get_args(Level) else "not a level"
        raise InvalidRequest(f"durability {durability!r} is {what}; use one of {known}", param="durability")
    if if_match is not None and not (isinstance(if_match, int) and 0 <= if_match <= MAX_POSITION):
        raise InvalidRequest("if_match must be a position, or 0 for no items", param="if_match")


def _given_id(item: Mapping[str, Any], given: str | None, index: int) -> str:
    """The id that the caller named, or the item's own."""
    own = item.get("id")
    if given is None and own is None:
        return make_item_id(item)
    if given is not None and own is not None and given != own:
        raise InvalidRequest(
            f"items[{index}] has id {own!r} in its body and {given!r} beside it", param=f"items[{index}].id"
        )
    return check_id(given if given is not None else own, f"items[{index}].id")
