"""Items as JSON: what is accepted comes back equal, whatever it holds.

The fast path encodes with msgspec and decodes again to prove that nothing changed in meaning (msgspec
writes NaN as null, and dates and bytes as strings). What fails that proof takes the exact path through
the standard library, which can also write lone surrogates (as escapes).
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Mapping
from typing import Any

import msgspec

from buffer.errors import InvalidRequest, TooLarge

# Deeper items are refused: readers in other languages stop at about this depth, and parsers recurse.
MAX_ITEM_DEPTH = 100
# Longer integers are refused: Python's own JSON reader stops there.
MAX_INTEGER_DIGITS = 4_300

_INTEGER_BOUND = 10**MAX_INTEGER_DIGITS
# Two halves that stand side by side come back from JSON as the one character that they make.
_SPLIT_CHARACTER = re.compile("[\ud800-\udbff][\udc00-\udfff]")

_encode = msgspec.json.Encoder().encode
_encode_sorted = msgspec.json.Encoder(order="deterministic").encode
_decode = msgspec.json.Decoder().decode


def encode_item(item: object, param: str, max_bytes: int) -> bytes:
    """The item's JSON in UTF-8.

    Raises:
        InvalidRequest: not a JSON object, a value that JSON cannot hold, or nested too deeply.
        TooLarge: longer than ``max_bytes``.
    """
    if type(item) is not dict:
        if not isinstance(item, Mapping):
            raise InvalidRequest(f"{param} must be a JSON object, not {type(item).__name__}", param=param)
        item = dict(item)
    try:
        payload = _encode(item)
        if _decode(payload) != item:
            payload = _encode_exact(item, param)
    except (TypeError, ValueError, RecursionError, msgspec.MsgspecError):
        payload = _encode_exact(item, param)
    if len(payload) > max_bytes:
        raise TooLarge(
            f"{param} is {len(payload)} bytes of JSON; the limit is {max_bytes} (max_item_bytes)", param=param
        )
    if payload.count(b"{") + payload.count(b"[") > MAX_ITEM_DEPTH:
        _check_depth(item, param)
    return payload


def _encode_exact(item: dict[str, Any], param: str) -> bytes:
    _check_depth(item, param)
    _check_values(item, param)
    return json.dumps(item, allow_nan=False, separators=(",", ":")).encode()


def _check_depth(value: object, param: str, levels_left: int = MAX_ITEM_DEPTH) -> None:
    # Depth first: a list that holds itself twice is refused after 100 steps, not after 2^100.
    if not isinstance(value, dict | list | tuple):
        return
    if not levels_left:
        raise TooLarge(f"{param} is nested more than {MAX_ITEM_DEPTH} levels deep, the limit", param=param)
    for child in value.values() if isinstance(value, dict) else value:
        _check_depth(child, param, levels_left - 1)


def _check_values(value: object, param: str) -> None:
    """Raise for whatever JSON would lose or bend; called only when the fast path had doubts."""
    if isinstance(value, dict):
        for key, child in value.items():
            if not isinstance(key, str):
                raise InvalidRequest(f"{param} has a key that is not a string: {key!r}", param=param)
            _check_text(key, f"a key of {param}", param)
            _check_values(child, f"{param}.{key}")
    elif isinstance(value, list | tuple):
        for index, child in enumerate(value):
            _check_values(child, f"{param}[{index}]")
    elif isinstance(value, str):
        _check_text(value, param, param)
    elif isinstance(value, int | float):
        _check_number(value, param)
    elif value is not None:
        raise InvalidRequest(f"{param} is a {type(value).__name__}, which JSON cannot hold", param=param)


def _check_text(text: str, what: str, param: str) -> None:
    if _SPLIT_CHARACTER.search(text):
        raise InvalidRequest(
            f"{what} holds a surrogate pair, which JSON cannot tell from the one character", param=param
        )


def _check_number(value: float, param: str) -> None:
    if isinstance(value, float) and not math.isfinite(value):
        raise InvalidRequest(f"{param} is {value!r}, which JSON cannot hold", param=param)
    if isinstance(value, int) and not -_INTEGER_BOUND < value < _INTEGER_BOUND:
        raise TooLarge(f"{param} has more than {MAX_INTEGER_DIGITS} digits, the limit", param=param)


def decode_item(payload: bytes | str) -> Any:
    """The JSON value; falls back to the standard library for lone surrogates."""
    try:
        return _decode(payload)
    except (msgspec.DecodeError, UnicodeDecodeError):
        return json.loads(payload)


def body_digest(item: object, payload: bytes) -> bytes:
    """8 bytes that are the same for items that are equal as JSON, whatever the order of their keys.

    Numbers are compared as written: 1 and 1.0 differ.
    """
    try:
        canonical = _encode_sorted(item)
    except (TypeError, ValueError, msgspec.MsgspecError):
        canonical = _canonical(decode_item(payload))
    return hashlib.blake2b(canonical, digest_size=8).digest()


def _canonical(value: object) -> bytes:
    try:
        return _encode_sorted(value)  # the item held a subclass of str or float, or was a Mapping
    except ValueError:
        return json.dumps(value, sort_keys=True, separators=(",", ":")).encode()


def equal_as_json(one: bytes | str, other: bytes | str) -> bool:
    """Whether two payloads are the same JSON value under the rule of `body_digest`."""
    if one == other:
        return True
    a = one.encode() if isinstance(one, str) else one
    b = other.encode() if isinstance(other, str) else other
    return body_digest(decode_item(a), a) == body_digest(decode_item(b), b)
