"""One line of a transfer file: a conversation as a JSON object.

===================  ===============================================================================
key                  holds
===================  ===============================================================================
``conversation_id``  the conversation's id
``items``            the items, oldest first; one may carry its own ``id`` and ``created_at``
``metadata``         a JSON object; missing, null and ``{}`` all mean none
``user``             the user's id; may be missing
``tenant``           the tenant's id; ``default`` if missing
``created_at``       when the conversation began; may be missing
``added_ids``        ordinals of items whose ``id`` is not a part of the stored item: export added it
``null_ids``         ordinals of items that are stored with ``"id": null`` in the place of their ``id``
``item_times``       when each item was created; wins over what the items say themselves
===================  ===============================================================================

A time is Unix seconds (a number) or an ISO 8601 string, UTC unless it says otherwise, before 2038-01-19:
positions hold no more. Export writes the last three only where import could not tell by itself.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any, NamedTuple

import msgspec

from buffer.errors import InvalidRequest, TooLarge
from buffer.model.codec import decode_item, encode_item
from buffer.model.ids import check_id, derive_item_id
from buffer.model.position import SEQUENCE_BITS

DEFAULT_TENANT = "default"

# Room for 512 items of one conversation in one second before they push on into the next one.
_BITS_IN_A_SECOND = 9
TOO_LATE_SECONDS = 1 << SEQUENCE_BITS - _BITS_IN_A_SECOND


class LineItem(NamedTuple):
    """An item of a line. ``wanted`` is the position that its own time asks for, None without a time."""

    item_id: str
    data: str
    created_at: datetime
    wanted: int | None


@dataclass(slots=True)
class Line:
    """A line that passed all checks. ``metadata`` is JSON."""

    number: int
    tenant: str
    conversation: str
    user: str | None
    metadata: str | None
    created_at: datetime
    items: list[LineItem] = field(default_factory=list)

    @property
    def key(self) -> tuple[str, str]:
        """(tenant, conversation)."""
        return self.tenant, self.conversation


@dataclass(slots=True, frozen=True)
class Rules:
    """What lines are checked against. ``tenant`` None: each line names its own, or means the default one.

    ``now`` stands for the times that a line doesn't give.
    """

    tenant: str | None
    max_item_bytes: int
    now: datetime


def parse_line(raw: bytes, number: int, rules: Rules) -> Line:
    """The conversation of a line.

    Raises:
        InvalidRequest, TooLarge: why the line is refused; ``param`` is the field at fault, or None.
    """
    try:
        value = decode_item(raw)
    except (ValueError, RecursionError, msgspec.MsgspecError) as error:
        raise InvalidRequest(f"not JSON in UTF-8: {error}") from error
    if not isinstance(value, dict):
        raise InvalidRequest(f"must be a JSON object, not {type(value).__name__}")
    items = value.get("items")
    if not isinstance(items, list):
        raise InvalidRequest(f"items must be a list, not {type(items).__name__}", param="items")
    conversation = check_id(value.get("conversation_id"), "conversation_id")
    user = value.get("user")
    began = value.get("created_at")
    began = None if began is None else parse_time(began, "created_at")
    added = _ordinals(value.get("added_ids"), "added_ids", items)
    null = _ordinals(value.get("null_ids"), "null_ids", items)
    times = own_times(items) if value.get("item_times") is None else _given_times(value["item_times"], items)
    line = Line(
        number,
        _tenant(value.get("tenant"), rules),
        conversation,
        None if user is None else check_id(user, "user"),
        _metadata(value.get("metadata"), rules),
        began or min((time for time in times if time is not None), default=rules.now),
    )
    created_ats = derive_times(times, line.created_at)
    for ordinal, (item, time, created_at) in enumerate(zip(items, times, created_ats, strict=True)):
        param = f"items[{ordinal}]"
        own = item.get("id") if isinstance(item, dict) else None
        item_id = derive_item_id(conversation, ordinal) if own is None else check_id(own, f"{param}.id")
        if ordinal in added:
            del item["id"]
        elif ordinal in null:
            item["id"] = None
        data = encode_item(item, param, rules.max_item_bytes).decode()
        wanted = None if time is None else int(time.timestamp()) << _BITS_IN_A_SECOND
        line.items.append(LineItem(item_id, data, created_at, wanted))
    return line


def parse_time(value: object, param: str) -> datetime:
    """A point in time from Unix seconds or ISO 8601.

    Raises:
        InvalidRequest: neither of the two.
        TooLarge: from 2038-01-19 on, or before 1970: no position stands for that.
    """
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        raise InvalidRequest(
            f"{param} must be Unix seconds or an ISO 8601 string, not {type(value).__name__}", param=param
        )
    if isinstance(value, str):
        try:
            time = datetime.fromisoformat(value)
        except ValueError as error:
            raise InvalidRequest(f"{param} is {value[:40]!r}, which is not ISO 8601", param=param) from error
        time = time.replace(tzinfo=UTC) if time.tzinfo is None else time
        seconds: float = time.timestamp()
    else:
        seconds = value
    if not 0 <= seconds < TOO_LATE_SECONDS:
        raise TooLarge(
            f"{param} is {value}; the limits are 0 and {TOO_LATE_SECONDS - 1} seconds, 2038-01-19",
            param=param,
        )
    return time.astimezone(UTC) if isinstance(value, str) else datetime.fromtimestamp(seconds, UTC)


def own_times(items: Iterable[Any]) -> list[datetime | None]:
    """What the items themselves say in ``created_at``.

    Raises:
        InvalidRequest, TooLarge: one says something that is no time.
    """
    times = []
    for ordinal, item in enumerate(items):
        own = item.get("created_at") if isinstance(item, dict) else None
        times.append(None if own is None else parse_time(own, f"items[{ordinal}].created_at"))
    return times


def derive_times(times: Iterable[datetime | None], began: datetime) -> list[datetime]:
    """Times without gaps: that of the item before it for an item without one, ``began`` for the first."""
    last = began
    return [last := time or last for time in times]


def _tenant(named: object, rules: Rules) -> str:
    if named is None:
        return rules.tenant or DEFAULT_TENANT
    tenant = check_id(named, "tenant")
    if rules.tenant not in {None, tenant}:
        message = f"tenant is {tenant!r}; this import is for {rules.tenant!r} alone"
        raise InvalidRequest(message, param="tenant")
    return tenant


def _metadata(value: object, rules: Rules) -> str | None:
    if value is None or value == {}:
        return None
    return encode_item(value, "metadata", rules.max_item_bytes).decode()


def _ordinals(value: object, param: str, items: Sequence[Any]) -> frozenset[int]:
    if value is None:
        return frozenset()
    if not isinstance(value, list) or not all(_has_id(items, ordinal) for ordinal in value):
        raise InvalidRequest(f"{param} must list ordinals of items that have an id", param=param)
    return frozenset(value)


def _has_id(items: Sequence[Any], ordinal: object) -> bool:
    return (
        isinstance(ordinal, int)
        and 0 <= ordinal < len(items)
        and isinstance(items[ordinal], dict)
        and items[ordinal].get("id") is not None
    )


def _given_times(value: object, items: Sequence[Any]) -> list[datetime | None]:
    if not isinstance(value, list) or len(value) != len(items):
        raise InvalidRequest(f"item_times must be a list of {len(items)}, one an item", param="item_times")
    return [None if t is None else parse_time(t, f"item_times[{n}]") for n, t in enumerate(value)]
