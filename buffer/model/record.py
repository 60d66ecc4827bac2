"""The record: one item as an entry of a shard's stream.

An entry has two fields. ``d`` is the item's JSON, which Redis never looks into. ``h`` is a header that
a person can read in ``XRANGE``; ids cannot hold ``/``, so it splits without escapes::

    1/i/acme/c7/m-91/u42/1732368000123/1099511627775/+
    │ │ │    │  │    │   │             │             └ "+": the batch goes on with the next entry
    │ │ │    │  │    │   │             └ items after this position are removed (replace_after), or empty
    │ │ │    │  │    │   └ accepted at, Unix milliseconds, by the accepting process's clock
    │ │ │    │  │    └ user, or empty
    │ │ │    │  └ item id
    │ │ tenant/conversation
    │ └ kind: "i" an item
    └ format version; a flusher that meets a newer one holds the shard
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import UTC, datetime

FORMAT_VERSION = "1"
KIND_ITEM = "i"


class UnknownRecordFormat(ValueError):  # noqa: N818 - says what was met, not that we erred
    """A header of a newer format version, or one that is damaged."""


@dataclass(slots=True, frozen=True)
class Record:
    """One decoded entry. ``data`` is the item's JSON; ``sequence`` is its number in the shard."""

    sequence: int
    tenant: str
    conversation: str
    item_id: str
    user: str | None
    created_ms: int
    replace_after: int | None
    batch_continues: bool
    data: bytes

    @property
    def conversation_key(self) -> str:
        """``tenant/conversation``."""
        return f"{self.tenant}/{self.conversation}"

    @property
    def created_at(self) -> datetime:
        """When the item was accepted."""
        return datetime.fromtimestamp(self.created_ms / 1000, UTC)


def encode_header(
    conversation_key: str,
    item_id: str,
    user: str | None,
    created_ms: int,
    replace_after: int | None,
    *,
    batch_continues: bool,
) -> bytes:
    """The ``h`` field of an item's entry."""
    cut = "" if replace_after is None else replace_after
    more = "+" if batch_continues else ""
    return f"1/i/{conversation_key}/{item_id}/{user or ''}/{created_ms}/{cut}/{more}".encode()


def decode_entry(entry_id: bytes, header: bytes, data: bytes) -> Record:
    """The record of an entry as ``XRANGE`` returns it.

    Raises:
        UnknownRecordFormat: a newer format version, or not a header of ours.
    """
    parts = header.decode().split("/")
    if parts[0] != FORMAT_VERSION or len(parts) != 9 or parts[1] != KIND_ITEM:
        raise UnknownRecordFormat(f"record {entry_id.decode()} has header {header[:80]!r}")
    _, _, tenant, conversation, item_id, user, created_ms, cut, more = parts
    return Record(
        int(entry_id[entry_id.index(b"-") + 1 :]),
        tenant,
        conversation,
        item_id,
        user or None,
        int(created_ms),
        int(cut) if cut else None,
        more == "+",
        data,
    )
