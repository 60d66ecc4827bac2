"""What callers get back."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any, Literal, Self

import msgspec

from buffer.model.messages import Message, to_messages
from buffer.model.position import SEQUENCE_BITS

Level = Literal["buffered", "replicated", "stored"]
Path = Literal["stream", "direct"]


class Receipt(msgspec.Struct, frozen=True, gc=False):
    """Proof of an append.

    ``level`` is the durability that was reached, never one that was only asked for. ``duplicate`` says
    that the id was known already and this is the first receipt again.
    """

    id: str
    position: int
    level: Level
    path: Path = "stream"
    duplicate: bool = False


_bare, _update = dict.__new__, dict.update


class Item(dict[str, Any]):
    """An item exactly as it was appended; its id, position and time are attributes, never keys."""

    __slots__ = ("_created_at", "id", "position")

    id: str
    position: int

    def __init__(
        self,
        value: dict[str, Any],
        *,
        id: str,  # noqa: A002 - the contract's name
        position: int,
        created_at: datetime | int,
    ) -> None:
        super().__init__(value)
        self.id = id
        self.position = position
        self._created_at = created_at

    @classmethod
    def many(cls, rows: Iterable[tuple[int, int, str, int, dict[str, Any]]]) -> list[Self]:
        """Items of (epoch, sequence, id, Unix ms, value), in a third of the time: a read makes twenty."""
        items = []
        for epoch, sequence, item_id, created_ms, value in rows:
            item = _bare(cls)
            _update(item, value)
            item.id = item_id
            item.position = (epoch << SEQUENCE_BITS) + sequence
            item._created_at = created_ms  # noqa: SLF001 - its own class
            items.append(item)
        return items

    @property
    def created_at(self) -> datetime:
        """When the item was accepted."""
        if isinstance(self._created_at, int):  # Unix milliseconds, as a view keeps them
            self._created_at = datetime.fromtimestamp(self._created_at / 1000, UTC)
        return self._created_at


@dataclass(slots=True, frozen=True)
class Summary:
    """What stands for the items up to and including position ``through``.

    ``made_by`` is the model that made it, ``extractive``, or ``application`` for one that was set.
    """

    text: str
    through: int
    made_by: str = "application"
    created_at: datetime | None = None


@dataclass(slots=True, frozen=True)
class Context:
    """What a prompt is built from: a summary, and the newest items, oldest first.

    ``over_budget``: even the fewest items that a model accepts alone are more than was asked for.
    ``summary_left_out``: there is a summary, and no room for it beside the newest items.
    """

    items: list[Item]
    last_position: int | None
    complete: bool = True
    summary: Summary | None = None
    over_budget: bool = False
    summary_left_out: bool = False

    def messages(self) -> list[Message]:
        """The summary and the items as chat-completions messages, see `buffer.model.messages`."""
        return to_messages(self.items, self.summary.text if self.summary else None)


@dataclass(slots=True, frozen=True)
class Erased:
    """Everything of a conversation up to and including position ``through`` is gone for good."""

    conversation: str
    through: int


class Slice(msgspec.Struct, frozen=True):
    """Items of one read, oldest first; ``more`` if a limit cut others off.

    ``last_position`` is the conversation's, removed items and removals included: what ``if_match`` compares.
    ``first`` is the conversation's first item, if it is at hand.
    """

    items: list[Item]
    more: bool
    complete: bool
    last_position: int | None = None
    summary: Summary | None = None
    first: Item | None = None


@dataclass(slots=True, frozen=True)
class Page:
    """One page of a conversation's items, in the order that was asked for."""

    items: list[Item] = field(default_factory=list)
    has_more: bool = False
    complete: bool = True

    @property
    def first_id(self) -> str | None:
        """The first item's id, or None on an empty page."""
        return self.items[0].id if self.items else None

    @property
    def last_id(self) -> str | None:
        """The last item's id, or None on an empty page; the ``after`` of the next page."""
        return self.items[-1].id if self.items else None


@dataclass(slots=True, frozen=True)
class ConversationInfo:
    """A conversation, without its items.

    ``active_at`` is when its last item was accepted; it may lag one flush, and is kept up to date only for
    conversations that have a user.
    """

    id: str
    user: str | None
    metadata: dict[str, Any]
    created_at: datetime
    active_at: datetime


@dataclass(slots=True, frozen=True)
class ConversationPage:
    """One page of a user's conversations, newest activity first."""

    conversations: list[ConversationInfo] = field(default_factory=list)
    has_more: bool = False

    @property
    def first_id(self) -> str | None:
        """The first conversation's id, or None on an empty page."""
        return self.conversations[0].id if self.conversations else None

    @property
    def last_id(self) -> str | None:
        """The last conversation's id, or None on an empty page; the ``after`` of the next page."""
        return self.conversations[-1].id if self.conversations else None


@dataclass(slots=True, frozen=True)
class Event:
    """Something that happened in a conversation, at a position of its order.

    ``appended``: ``item`` is new. ``deleted``: the item ``item_id`` is gone, or without one what
    ``removed_after`` says. With ``removed_after``, of either type, the items after that position and before
    the event's own are gone: replaced by what was appended, or erased.
    """

    type: Literal["appended", "deleted"]
    position: int
    item_id: str | None
    item: Item | None = None
    removed_after: int | None = None
