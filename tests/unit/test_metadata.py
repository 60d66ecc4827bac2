"""Metadata: what is allowed, and what an error says."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from buffer import InvalidRequest, TooLarge
from buffer.model.metadata import decode_metadata, encode_metadata

_TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=64)


@given(st.dictionaries(_TEXT, _TEXT, max_size=16))
def test_what_is_allowed_comes_back(metadata: dict[str, str]) -> None:
    """Any text, NUL included; without pairs there is nothing to store."""
    data = encode_metadata(metadata)
    assert decode_metadata(data) == metadata
    assert (data is None) == (not metadata)


@pytest.mark.parametrize(
    ("metadata", "error", "words"),
    [
        ({str(n): "" for n in range(17)}, TooLarge, ["metadata", "17", "16"]),
        ({"k" * 65: ""}, TooLarge, ["key", "65", "64"]),
        ({"plan": "x" * 513}, TooLarge, ["metadata.plan", "513", "512"]),
        ({"plan": 1}, InvalidRequest, ["metadata.plan", "string", "int"]),
        ({"plan": None}, InvalidRequest, ["metadata.plan", "string", "NoneType"]),
        ({1: "x"}, InvalidRequest, ["key", "string", "1"]),
        (["plan"], InvalidRequest, ["metadata", "object", "list"]),
        ("plan", InvalidRequest, ["metadata", "object", "str"]),
    ],
)
def test_what_is_not_allowed_is_named_with_its_limit(metadata: Any, error: type, words: list[str]) -> None:
    """The error tells the field, what it is, and what it may be."""
    with pytest.raises(error) as caught:
        encode_metadata(metadata)
    assert str(caught.value.param).startswith("metadata")
    for word in words:
        assert word in str(caught.value)


def test_limits_themselves_are_allowed() -> None:
    """Sixteen pairs, the longest keys and values, characters outside of the first plane."""
    metadata = {f"{n:02}" + "\N{GRINNING FACE}" * 62: "\N{GRINNING FACE}" * 512 for n in range(16)}
    assert decode_metadata(encode_metadata(metadata)) == metadata
