"""Ids: what is allowed, how missing ones are made, how they map to shards and keys.

An id is 1 to 200 characters without control characters and without ``/``, and is not ``.`` or ``..``.
Because ``/`` is excluded, joining ids with it can never make two different tuples meet.
"""

from __future__ import annotations

import os
import re
import time
from collections.abc import Mapping
from hashlib import blake2b
from typing import Any
from zlib import crc32

from buffer.errors import InvalidRequest, TooLarge

MAX_ID_CHARACTERS = 200

# Control characters (C0, DEL, C1), the separator, and surrogates, which have no UTF-8 form.
_FORBIDDEN = re.compile("[\x00-\x1f\x7f-\x9f/\ud800-\udfff]")

# The prefixes that OpenAI gives its ids, so that an item of ours is accepted back as model input.
_ITEM_PREFIXES = {
    "message": "msg_",
    "function_call": "fc_",
    "function_call_output": "fco_",
    "reasoning": "rs_",
}


def check_id(value: object, param: str) -> str:
    """The id itself, or `InvalidRequest` that names ``param`` and the rule that was broken."""
    if not isinstance(value, str):
        raise InvalidRequest(f"{param} must be a string, not {type(value).__name__}", param=param)
    if not value or value in {".", ".."}:
        raise InvalidRequest(f"{param} must not be empty, '.' or '..'", param=param)
    if len(value) > MAX_ID_CHARACTERS:
        raise TooLarge(f"{param} has {len(value)} characters; the limit is {MAX_ID_CHARACTERS}", param=param)
    if _FORBIDDEN.search(value):
        raise InvalidRequest(
            f"{param} holds a control character, a lone surrogate or '/', which ids must not", param=param
        )
    return value


_random: list[str] = []  # random ends of ids, fetched from the system many at a time
# A forked child must not hand out the ids that its parent is about to hand out.
os.register_at_fork(after_in_child=_random.clear)


def _refill() -> None:
    """Make 256 random ends: version 7, 12 random bits, the variant, 62 random bits."""
    digits = os.urandom(10 * 256).hex()
    for at in range(0, len(digits), 20):
        variant = "89ab"[int(digits[at + 3], 16) & 3]
        _random.append(f"7{digits[at : at + 3]}{variant}{digits[at + 4 : at + 19]}")


def uuid7_hex() -> str:
    """32 hex digits of a UUIDv7 (RFC 9562): 48 bits of milliseconds, version, variant, random bits."""
    try:
        end = _random.pop()
    except IndexError:  # asked for, not looked up before: another thread may take the last one
        _refill()
        return uuid7_hex()
    return f"{time.time_ns() // 1_000_000 & 0xFFFF_FFFF_FFFF:012x}{end}"


def make_item_id(item: Mapping[str, Any]) -> str:
    """A new id with the prefix of the item's type; an item without a type but with a role is a message."""
    kind = item.get("type") or ("message" if "role" in item else "")
    prefix = _ITEM_PREFIXES.get(kind, "item_") if type(kind) is str else "item_"
    return prefix + uuid7_hex()


def make_conversation_id() -> str:
    """A new conversation id, ``conv_`` and 32 hex digits."""
    return "conv_" + uuid7_hex()


def derive_item_id(conversation: str, ordinal: int) -> str:
    """The id of an imported item without one: the same file always derives the same ids."""
    digest = blake2b(f"{conversation}/{ordinal}".encode(), digest_size=16).hexdigest()
    return f"item_{digest}"


def conversation_key(tenant: str, conversation: str) -> str:
    """One string for (tenant, conversation); unambiguous, since neither holds ``/``."""
    return f"{tenant}/{conversation}"


def shard_of(conversation_key: str, shards: int) -> int:
    """The shard in which a conversation lives, for as long as the number of shards stands."""
    return crc32(conversation_key.encode()) % shards


def id_digest(conversation_key: str, item_id: str) -> bytes:
    """16 bytes that stand for (tenant, conversation, item id) in a shard's idempotency window."""
    return blake2b(f"{conversation_key}/{item_id}".encode(), digest_size=16).digest()
