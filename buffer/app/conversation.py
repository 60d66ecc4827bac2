"""`Conversation`: everything that can be done with one conversation."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

from buffer.app.limits import check_count
from buffer.append.appender import Target
from buffer.errors import InvalidRequest, NotFound, OutcomeUnknown, PreconditionFailed, Unavailable
from buffer.model.ids import check_id
from buffer.model.position import MAX_POSITION
from buffer.model.record import DELETE, ERASE
from buffer.model.types import (
    Context,
    ConversationInfo,
    Erased,
    Event,
    Item,
    Level,
    Page,
    Receipt,
    Slice,
    Summary,
)
from buffer.policy.budget import TokenCounter, estimate_tokens, is_system, select
from buffer.summaries.text import check_text

if TYPE_CHECKING:
    from buffer.app.runtime import Runtime


class Conversation:
    """One conversation of one tenant. Cheap to make; holds no connection."""

    __slots__ = ("_runtime", "_target", "id", "tenant", "user")

    def __init__(self, runtime: Runtime, tenant: str, conversation: str, user: str | None) -> None:
        self._runtime = runtime
        self.tenant = tenant
        self.id = conversation
        self.user = user
        self._target = Target(tenant, conversation, user, runtime.settings.shards)

    def __repr__(self) -> str:
        return f"Conversation({self.id!r}, tenant={self.tenant!r})"

    async def append(
        self,
        item: Mapping[str, Any],
        *,
        id: str | None = None,  # noqa: A002 - the contract's name
        durability: Level = "buffered",
        if_match: int | None = None,
        replace_after: str | None = None,
        timeout: float | None = None,
    ) -> Receipt:
        """Append one item; see `extend`."""
        after = None if replace_after is None else await self._position(replace_after, "replace_after")
        receipts = await self._runtime.appender.append(
            self._target, (item,), (id,), durability, if_match, after, timeout
        )
        return receipts[0]

    async def extend(
        self,
        items: Sequence[Mapping[str, Any]],
        *,
        ids: Sequence[str | None] | None = None,
        durability: Level = "buffered",
        if_match: int | None = None,
        replace_after: str | None = None,
        timeout: float | None = None,
    ) -> list[Receipt]:
        """Append all items or none; one receipt an item, in order.

        Args:
            items: JSON objects, at most ``max_batch_items``, each at most ``max_item_bytes``.
            ids: one an item; a missing one is the item's own ``id``, or is made.
            durability: ``buffered`` returns once Redis has the items, ``stored`` once Postgres has.
            if_match: the position that must be the conversation's last one; 0 for "no items yet".
            replace_after: id of an item; those after it are removed in the same step.
            timeout: seconds; ``append_timeout_seconds`` by default.

        Raises:
            InvalidRequest, TooLarge: the request breaks a rule; nothing was stored.
            NotFound: there is no item ``replace_after``.
            Conflict: an id is known with another body, or only a part of the batch is known.
            PreconditionFailed: ``if_match`` is not the last position.
            Unavailable: nothing was stored; try again after ``retry_after`` seconds.
            OutcomeUnknown: it may be stored; repeat it with the same ids, and it is stored once.
        """
        after = None if replace_after is None else await self._position(replace_after, "replace_after")
        return await self._runtime.appender.append(
            self._target, items, ids, durability, if_match, after, timeout
        )

    async def context(
        self,
        turns: int = 20,
        tokens: int | None = None,
        *,
        count: TokenCounter = estimate_tokens,
        pin_system: bool = False,
    ) -> Context:
        """A summary of what came before, and the newest items that fit, oldest first, the unflushed included.

        The summary stands for the items up to its position ``through``. Some items may be in both, and with
        few ``turns`` some in neither: ``items(after=context.summary.through)`` has all that it leaves out.

        A tool call and its result are never separated, nor a reasoning item from the one after it, so there
        may be fewer items than would fit; see `buffer.policy.budget`.

        Args:
            turns: at most so many items.
            tokens: at most so many tokens, as ``count`` counts them, the summary included. If there is no
                room for it beside the fewest items that may stand alone, it is left out, with
                ``summary_left_out``; if not even those fit, they are returned alone, with ``over_budget``.
            count: tokens of one item; by default an estimate, see `buffer.policy.budget.estimate_tokens`.
            pin_system: keep the conversation's first item, if it is a system message, however old it is.

        Raises:
            InvalidRequest: a budget is not a positive number.
            Unavailable: a part of the answer could not be had.
        """
        check_count(turns, "turns")
        if tokens is not None and (not isinstance(tokens, int) or tokens < 1):
            raise InvalidRequest("tokens must be a positive number", param="tokens")
        read = await self._runtime.view_reader.newest(self.tenant, self.id, turns, first=pin_system)
        items, complete = read.items, read.complete
        if pin_system and read.more:
            first, known = await self._first(read)
            complete &= known
            items = [*(item for item in first if is_system(item)), *items]
        summary = read.summary
        summary_tokens = count({"role": "system", "content": summary.text}) if summary and tokens else 0
        kept = select(
            items,
            turns=turns,
            tokens=tokens,
            summary_tokens=summary_tokens,
            count=count,
            pin_system=pin_system,
        )
        chosen = [*items[: kept.pinned], *items[kept.first :]]
        return Context(
            chosen,
            read.last_position,
            complete,
            summary if kept.summary else None,
            over_budget=kept.over,
            summary_left_out=not kept.summary,
        )

    async def _first(self, read: Slice) -> tuple[list[Item], bool]:
        """The conversation's first item, and whether it is certain that it is."""
        if read.first:
            return [read.first], True
        oldest = await self._runtime.reader.oldest(self.tenant, self.id, 1)
        return oldest.items, oldest.complete

    async def set_summary(self, text: str, *, through: int, timeout: float | None = None) -> Summary:
        """Keep a summary of the application's own; it stands for the items up to position ``through``.

        It takes the place of one through the same position. Summaries that are made later are rolled forward
        from it. Items are never removed for it.

        Args:
            text: 1 to ``summary_max_bytes`` bytes of UTF-8.
            through: the position of an item; if it is not flushed yet, this waits for its flush.
            timeout: seconds for that; ``append_timeout_seconds`` by default.

        Raises:
            InvalidRequest, TooLarge: ``text`` or ``through`` breaks a rule.
            NotFound: no item stands at ``through``.
            Conflict: there is a summary that goes further.
            Unavailable: Postgres could not be asked, or the item was not flushed in time; try again, it is
                safe to repeat.
        """
        check_text(text, self._runtime.settings.summary_max_bytes)
        if not isinstance(through, int) or isinstance(through, bool) or not 1 <= through <= MAX_POSITION:
            raise InvalidRequest("through must be the position of an item", param="through")
        await self._wait_for_flush(through, timeout)
        summary = await self._runtime.summaries.set(self.tenant, self.id, through, text)
        await self._runtime.summary_committed(self.tenant, self.id, summary)
        return summary

    async def _wait_for_flush(self, position: int, timeout: float | None) -> None:
        """Return once an item is in Postgres.

        Raises:
            NotFound: there is no such item.
            Unavailable: it is not there within ``timeout`` seconds.
        """
        limit = timeout if timeout is not None else self._runtime.settings.append_timeout_seconds
        try:
            async with asyncio.timeout(limit):
                # A change of path ends the wait, too.
                while not await self._runtime.summaries.exists(self.tenant, self.id, position):
                    found = await self._runtime.reader.newest(
                        self.tenant, self.id, 1, position - 1, position + 1
                    )
                    if not found.items:
                        raise NotFound(
                            f"through: conversation {self.id!r} has no item at position {position}"
                        )
                    await self._runtime.appender.flushed(self._target.shard, position)
        except TimeoutError as error:
            raise Unavailable(f"the item is not in Postgres within {limit:g} s") from error

    async def items(
        self,
        *,
        after: str | int | None = None,
        before: str | int | None = None,
        limit: int = 100,
        order: Literal["asc", "desc"] = "asc",
    ) -> Page:
        """One page of items, the unflushed ones included.

        ``after`` and ``before`` name an item by id or a position, and exclude it. As in every list with
        cursors, ``after`` means "further on in this order": with ``desc``, older items. ``before`` is
        the opposite; of both bounds given, the page begins at ``after``.

        Raises:
            NotFound: there is no item of that id.
            Unavailable: a part of the answer could not be had.
        """
        check_count(limit, "limit")
        if order not in {"asc", "desc"}:
            raise InvalidRequest("order must be 'asc' or 'desc'", param="order")
        first = await self._bound(after, "after")
        last = await self._bound(before, "before")
        low, high = (first, last) if order == "asc" else (last, first)
        # The page begins at `after`; without it, and with `before`, it is the page that ends there.
        from_oldest = (order == "asc") == (after is not None or before is None)
        read = self._runtime.reader.oldest if from_oldest else self._runtime.reader.newest
        part = await read(self.tenant, self.id, limit, low or 0, MAX_POSITION if high is None else high)
        return Page(part.items if order == "asc" else part.items[::-1], part.more, part.complete)

    async def item(self, item_id: str) -> Item:
        """One item by its id, flushed or not.

        Raises:
            NotFound: there is none, or it was removed.
            Unavailable: a part of the answer could not be had.
        """
        return await self._runtime.lookup.item(self.tenant, self.id, check_id(item_id, "item_id"))

    def events(self, after: int | None = None) -> AsyncGenerator[Event, None]:
        """What happens in the conversation, through whichever process: each event once, in order.

        It goes on over flushes, changes of path and lost connections, and ends when the `Buffer` closes.
        ``aclose`` it, or leave the ``async for``, to stop listening.

        Args:
            after: the position after which to begin; an event's ``position`` resumes right behind it, and 0
                is the beginning. None: from now on, which is when the first event is asked for.

        Raises:
            InvalidRequest: ``after`` is not a position.
            SlowListener: more than ``events_buffer_max`` events were waiting. Those were given before this is
                raised; resume after its ``position``.
            Unavailable: it could not be found out what "now" is.
        """
        if after is not None and (not isinstance(after, int) or not 0 <= after <= MAX_POSITION):
            raise InvalidRequest("after must be a position, or None", param="after")
        return self._runtime.events.listen(self.tenant, self.id, after)

    async def create(self, metadata: Mapping[str, str] | None = None) -> ConversationInfo:
        """Make the conversation, with its user and metadata; appending to it does so as well, without any.

        Args:
            metadata: at most 16 pairs of strings, keys of at most 64 and values of at most 512 characters.

        Raises:
            InvalidRequest, TooLarge: the metadata breaks a limit.
            Conflict: it exists.
            Unavailable: a store that is needed for it does not answer.
        """
        return await self._runtime.directory.create(self.tenant, self.id, self.user, metadata)

    async def info(self) -> ConversationInfo:
        """What is known of the conversation beside its items.

        Raises:
            NotFound: it was never created, nor appended to.
            Unavailable: a store that is needed for it does not answer.
        """
        return await self._runtime.directory.info(self.tenant, self.id)

    async def set_metadata(self, metadata: Mapping[str, str] | None) -> ConversationInfo:
        """Replace the conversation's metadata; None or ``{}`` leaves it without any. Limits as in `create`.

        Raises:
            InvalidRequest, TooLarge: the metadata breaks a limit.
            NotFound: it was never created, nor appended to.
            Unavailable: a store that is needed for it does not answer.
        """
        return await self._runtime.directory.set_metadata(self.tenant, self.id, metadata)

    async def delete_item(self, item_id: str, *, timeout: float | None = None) -> None:
        """Delete one item, flushed or not; its id is not used again within the conversation.

        On return Postgres has the deletion, and nothing serves the item or stores it again.

        Raises:
            NotFound: there is no such item.
            Unavailable: nothing was deleted; try again after ``retry_after`` seconds.
            OutcomeUnknown: it may be deleted; try again, `NotFound` says that it is.
        """
        position = await self._position(item_id, "item_id")
        await self._remove(DELETE, item_id, position, None, timeout)

    async def pop(self, *, timeout: float | None = None) -> Item | None:
        """Delete the latest item and return it; None if there is none.

        Of concurrent calls, each gets another item. An item that is appended meanwhile is the latest then.

        Raises:
            Unavailable: nothing was deleted, or the latest item cannot be told.
            OutcomeUnknown: the item whose id it names may be deleted.
        """
        limit = self._runtime.settings.append_timeout_seconds if timeout is None else timeout
        deadline = time.monotonic() + limit
        while True:
            read = await self._runtime.view_reader.newest(self.tenant, self.id, 1)
            if not read.items:
                if not read.complete:
                    raise Unavailable("a part of the conversation cannot be reached", retry_after=1.0)
                return None
            (latest,) = read.items
            try:
                await self._remove(DELETE, latest.id, latest.position, read.last_position, timeout)
            except PreconditionFailed:
                if time.monotonic() > deadline:
                    raise Unavailable(f"others changed it all the time, for {limit:g} s") from None
                continue
            return latest

    async def delete(self, *, timeout: float | None = None) -> Erased:
        """Erase the conversation: items, removed items, summaries, dead letters, metadata.

        It covers every position up to the one in its receipt, and leaves a tombstone without content. On
        return no copy is served or stored again. A later append starts the conversation anew.

        Raises:
            Unavailable: nothing was erased; try again after ``retry_after`` seconds.
            OutcomeUnknown: it may be erased, or may become so; try again.
        """
        receipt = await self._remove(ERASE, self.id, None, None, timeout)
        return Erased(self.id, receipt.position)

    async def _remove(
        self, kind: str, item_id: str, position: int | None, expected: int | None, timeout: float | None
    ) -> Receipt:
        try:
            return await self._runtime.appender.remove(
                self._target, kind, item_id, position, expected=expected, timeout=timeout
            )
        except OutcomeUnknown as error:
            raise OutcomeUnknown(str(error), ids=[item_id], level=error.level) from error

    async def flushed(self, receipt: Receipt, *, timeout: float | None = None) -> None:
        """Return once the receipt's item is committed in Postgres; asks for a flush.

        Raises:
            OutcomeUnknown: not within ``timeout`` seconds.
        """
        if receipt.level == "stored":
            return
        limit = timeout if timeout is not None else self._runtime.settings.append_timeout_seconds
        try:
            async with asyncio.timeout(limit):
                await self._runtime.appender.flushed(self._target.shard, receipt.position)
        except TimeoutError as error:
            raise OutcomeUnknown(
                f"not in Postgres within {limit:g} s", ids=[receipt.id], level=receipt.level
            ) from error

    async def _bound(self, value: str | int | None, param: str) -> int | None:
        if value is None or isinstance(value, int):
            return value
        return await self._position(value, param)

    async def _position(self, item_id: str, param: str) -> int:
        check_id(item_id, param)
        position = await self._runtime.reader.position_of(self.tenant, self.id, item_id)
        if position is None:
            raise NotFound(f"{param}: conversation {self.id!r} has no item {item_id!r}")
        return position
