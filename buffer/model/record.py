"""The record: one item as an entry of a shard's stream.

An entry has two fields. ``d`` is the item's JSON, which Redis never looks into. ``h`` is a header that
a person can read in ``XRANGE``; ids cannot hold ``/``, so it splits without escapes::

    1/i/acme/c7/m-91/u42/1732368000123/1099511627775/+/41
    │ │ │    │  │    │   │             │             │ └ the conversation's unflushed entry before it,
    │ │ │    │  │    │   │             │             │   its number in the shard, or empty; added by Redis
    │ │ │    │  │    │   │             │             └ "+": the batch goes on with the next entry
    │ │ │    │  │    │   │             └ what the entry removes, see below, or empty
    │ │ │    │  │    │   └ accepted at, Unix milliseconds, by the accepting process's clock
    │ │ │    │  │    └ user, or empty
    │ │ │    │  └ item id
    │ │ tenant/conversation
    │ └ kind
    └ format version; a flusher that meets a newer one holds the shard

Kinds: ``i`` is an item; with a number it removes the items after that position (replace_after). ``d`` deletes
the item whose id it names, at that position. ``e`` erases everything before it. What is not an item has
no payload; it has a position all the same, so that removals have their place in the order.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import NamedTuple

from buffer.errors import BufferError
from buffer.model.position import MAX_POSITION

FORMAT_VERSION = "1"
ITEM, DELETE, ERASE = "i", "d", "e"

# 14 digits of milliseconds reach the year 5138: every such time is one in Python and in Postgres.
_is_header = re.compile(
    rf"{FORMAT_VERSION}/[{ITEM}{DELETE}{ERASE}]/[^/]+/[^/]+/[^/]+/[^/]*/[0-9]{{1,14}}/[0-9]{{0,19}}/\+?/[0-9]*".encode()
).fullmatch


class UnknownRecordFormat(BufferError):
    """A header of a newer format version, or one that is damaged."""


class Removal(NamedTuple):
    """Items after ``after`` and before ``before`` are removed, both excluded."""

    after: int
    before: int

    def covers(self, position: int) -> bool:
        """Whether an item at this position is removed."""
        return self.after < position < self.before


def removal(kind: str, cut: int | None, position: int) -> Removal | None:
    """What the entry at ``position`` removes."""
    if kind == ERASE:
        return Removal(-1, position)
    if cut is None:
        return None
    return Removal(cut, position) if kind == ITEM else Removal(cut - 1, cut + 1)


@dataclass(slots=True, frozen=True)
class Record:
    """One decoded entry. ``data`` is the item's JSON; ``sequence`` is its number in the shard.

    ``cut`` is what the entry removes, as its kind understands it (`removal`).
    """

    sequence: int
    tenant: str
    conversation: str
    item_id: str
    user: str | None
    created_ms: int
    cut: int | None
    batch_continues: bool
    data: bytes
    kind: str = ITEM

    @property
    def conversation_key(self) -> str:
        """``tenant/conversation``."""
        return f"{self.tenant}/{self.conversation}"

    @property
    def identity(self) -> tuple[str, str, str]:
        """What makes an item the same item: tenant, conversation, item id."""
        return self.tenant, self.conversation, self.item_id

    @property
    def created_at(self) -> datetime:
        """When the item was accepted."""
        return datetime.fromtimestamp(self.created_ms / 1000, UTC)


def encode_header(
    conversation_key: str,
    item_id: str,
    user: str | None,
    created_ms: int,
    cut: int | None,
    batch_continues: bool,
    kind: str = ITEM,
) -> bytes:
    """The ``h`` field of an entry, without the last part, which the append script adds."""
    number = "" if cut is None else cut
    more = "+" if batch_continues else ""
    return f"1/{kind}/{conversation_key}/{item_id}/{user or ''}/{created_ms}/{number}/{more}/".encode()


def decode_entry(entry_id: bytes, header: bytes, data: bytes) -> Record:
    """The record of an entry as ``XRANGE`` returns it.

    Raises:
        UnknownRecordFormat: a newer format version, or not a header of ours.
    """
    _, kind, tenant, conversation, item_id, user, created_ms, cut, more, _ = split_header(
        (entry_id, header, data)
    )
    return Record(
        int(entry_id[entry_id.index(b"-") + 1 :]),
        tenant.decode(),
        conversation.decode(),
        item_id.decode(),
        user.decode() or None,
        int(created_ms),
        int(cut) if cut else None,
        more == b"+",
        data,
        kind.decode(),
    )


def split_header(raw: tuple[bytes, bytes, bytes]) -> list[bytes]:
    """The ten parts of a raw entry's header, in UTF-8.

    Raises:
        UnknownRecordFormat: a newer format version, or not a header of ours.
    """
    header = raw[1]
    if not _is_header(header) or not (header.isascii() or _is_utf8(header)):
        raise _unknown(raw[0], header)
    parts = header.split(b"/")
    if len(parts[7]) == 19 and int(parts[7]) > MAX_POSITION:
        raise _unknown(raw[0], header)
    return parts


def _is_utf8(header: bytes) -> bool:
    try:
        header.decode()
    except UnicodeDecodeError:
        return False
    return True


def _unknown(entry_id: bytes, header: bytes) -> UnknownRecordFormat:
    return UnknownRecordFormat(f"record {entry_id.decode()} has header {header[:80]!r}")


def batch_continues(header: bytes) -> bool:
    """Whether the next entry belongs to the same append."""
    return header.rpartition(b"/")[0].endswith(b"/+")


def created_ms(header: bytes) -> int | None:
    """When an entry was accepted, Unix milliseconds; None where a newer format does not tell."""
    parts = header.split(b"/")
    return int(parts[6]) if len(parts) > 6 and parts[0] == b"1" and parts[6].isdigit() else None
