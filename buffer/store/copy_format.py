"""Rows of ``buffer.items`` in the binary format of COPY (PostgreSQL documentation, COPY, "Binary Format").

What comes from Redis is UTF-8 bytes, and so is what Postgres takes: encoding rows here, without a detour
through str and datetime, takes a third of the time that the driver's generic encoder takes.
"""

from __future__ import annotations

from struct import Struct

HEADER = b"PGCOPY\n\xff\r\n\0" + b"\0\0\0\0" + b"\0\0\0\0"
TRAILER = b"\xff\xff"

_COLUMNS = b"\0\x06"
_NULL = b"\xff\xff\xff\xff"
_EIGHT = b"\0\0\0\x08"
_length = Struct(">i").pack
_LENGTHS = [_length(n) for n in range(1024)]  # ids have at most 800 bytes
_bigint = Struct(">q").pack
# Timestamps count microseconds from 2000-01-01 UTC.
_EPOCH_MS = 946_684_800_000


def encode_row(
    tenant: bytes, conversation: bytes, position: int, item_id: bytes, created_ms: int, data: bytes | None
) -> bytes:
    """One row: tenant, conversation, position, item_id, created_at, data; text in UTF-8."""
    return b"".join(
        (
            _COLUMNS,
            _LENGTHS[len(tenant)],
            tenant,
            _LENGTHS[len(conversation)],
            conversation,
            _EIGHT,
            _bigint(position),
            _LENGTHS[len(item_id)],
            item_id,
            _EIGHT,
            _bigint((created_ms - _EPOCH_MS) * 1000),
            _length(len(data)) if data is not None else _NULL,
            data if data is not None else b"",
        )
    )
