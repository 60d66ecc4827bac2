"""Metadata of conversations, under OpenAI's limits: 16 pairs, keys to 64 characters, values to 512."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from buffer.errors import InvalidRequest, TooLarge
from buffer.model.codec import decode_item, encode_item

MAX_PAIRS = 16
MAX_KEY_CHARACTERS = 64
MAX_VALUE_CHARACTERS = 512

_MAX_BYTES = 1 << 20  # never reached: the limits above allow a tenth of it


def encode_metadata(metadata: object) -> str | None:
    """Its JSON; None for none at all, which null and ``{}`` mean.

    Raises:
        InvalidRequest, TooLarge: it breaks a limit; the message names the field and the limit.
    """
    if metadata is None:
        return None
    if not isinstance(metadata, Mapping):
        raise InvalidRequest(f"metadata must be an object, not {type(metadata).__name__}", param="metadata")
    if len(metadata) > MAX_PAIRS:
        raise TooLarge(f"metadata has {len(metadata)} pairs; the limit is {MAX_PAIRS}", param="metadata")
    for key, value in metadata.items():
        _check_pair(key, value)
    return encode_item(metadata, "metadata", _MAX_BYTES).decode() if metadata else None


def _check_pair(key: object, value: object) -> None:
    if not isinstance(key, str):
        raise InvalidRequest(f"metadata has a key that is not a string: {key!r:.100}", param="metadata")
    if len(key) > MAX_KEY_CHARACTERS:
        raise TooLarge(
            f"metadata has a key of {len(key)} characters; the limit is {MAX_KEY_CHARACTERS}",
            param="metadata",
        )
    param = f"metadata.{key}"
    if not isinstance(value, str):
        raise InvalidRequest(f"{param} must be a string, not {type(value).__name__}", param=param)
    if len(value) > MAX_VALUE_CHARACTERS:
        raise TooLarge(
            f"{param} has {len(value)} characters; the limit is {MAX_VALUE_CHARACTERS}", param=param
        )


def decode_metadata(data: str | None) -> dict[str, Any]:
    """What `encode_metadata`, or an import, stored."""
    return {} if data is None else decode_item(data)
