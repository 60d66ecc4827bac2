"""Items as JSON: what is accepted comes back equal; what is not gets an error that names the rule."""

from __future__ import annotations

import enum
import json
import math
from collections import OrderedDict
from datetime import UTC, date, datetime
from decimal import Decimal
from types import MappingProxyType
from typing import Any
from uuid import uuid4

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from buffer.errors import InvalidRequest, TooLarge
from buffer.model.codec import (
    MAX_INTEGER_DIGITS,
    MAX_ITEM_DEPTH,
    body_digest,
    decode_item,
    encode_item,
    equal_as_json,
)

from .strategies import json_values

MIB = 1 << 20
HIGH, LOW = chr(0xD83D), chr(0xDE00)  # the halves of U+1F600

characters = st.text(st.characters(exclude_categories=["Cs"]), max_size=12)
with_lone_surrogates = (
    st.text(st.sampled_from(["a", "é", "\0", '"', "\\", "😀", HIGH]), max_size=6) | characters
)
values = json_values(characters)
odd_values = json_values(with_lone_surrogates)
# Values that are near each other, so that two draws are often equal, or almost.
near = st.recursive(
    st.sampled_from(
        [None, False, True, 0, 1, -1, 0.0, -0.0, 1.0, "", "0", "1", "null", "a", "é", HIGH, "\\ud83d"]
    )
    | st.sampled_from([2**53, 2.0**53, 2**53 + 1, 2**64, 2.0**64, 2**64 + 1, 10**400]),
    lambda inner: (
        st.lists(inner, max_size=2) | st.dictionaries(st.sampled_from(["a", "b", HIGH]), inner, max_size=2)
    ),
    max_leaves=4,
)


def encode(item: object, max_bytes: int = MIB) -> bytes:
    return encode_item(item, "items[0]", max_bytes)


def same(one: Any, other: Any) -> bool:
    """Equal in type and value, all the way down: 1, 1.0 and True differ, and so do 0.0 and -0.0."""
    if type(one) is not type(other):
        return False
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(value, other[key]) for key, value in one.items())
    if isinstance(one, list):
        return len(one) == len(other) and all(map(same, one, other))
    if isinstance(one, float):
        return one == other and math.copysign(1, one) == math.copysign(1, other)
    return bool(one == other)


def nested(levels: int, *, lists: bool = False) -> dict[str, Any]:
    """An item of that many levels, its own included."""
    value: Any = [] if lists else {}
    for _ in range(levels - 2):
        value = [value] if lists else {"a": value}
    return {"a": value} if levels > 1 else {}


def shuffled(value: Any, data: st.DataObject) -> Any:
    """The same value with the keys of its objects in another order."""
    if isinstance(value, dict):
        return {key: shuffled(value[key], data) for key in data.draw(st.permutations(list(value)))}
    return [shuffled(child, data) for child in value] if isinstance(value, list) else value


class Text(str):
    __slots__ = ()


class Real(float):
    __slots__ = ()


class Colour(enum.Enum):
    RED = "red"


# --- what is accepted


@given(odd_values)
@example({"\0": "\0", "": "\u2028\u2029\ufeff\uffff"})
@example({HIGH: [LOW, LOW + HIGH, "😀", "\\ud83d\\ude00"]})
@example([2**63, 2**64, -(2**63) - 1, 10**4299, 0.1 + 0.2, 1e308, 5e-324, -0.0, 1e16, 1e22])
@example([[], {}, [[]], [{}], "", None, {"": {"": []}}])
@example({"role": "user", "content": "", "type": "no_such_type", "extra": {"deep": [None]}})
def test_what_is_accepted_comes_back_equal(value: Any) -> None:
    """Type and value of everything survive: NUL, lone surrogates, emoji, any integer, any float."""
    item = {"value": value}
    payload = encode(item)
    assert same(decode_item(payload), item)
    assert same(decode_item(payload.decode()), item)


@given(odd_values)
def test_payloads_are_json_for_every_reader(value: Any) -> None:
    """Plain JSON in UTF-8, which the standard library reads to the same value."""
    item = {"value": value}
    assert same(json.loads(encode(item).decode("utf-8")), item)


@given(odd_values)
def test_what_was_read_is_accepted_again_unchanged(value: Any) -> None:
    """Export and import give back the same item; nothing wears off."""
    payload = encode({"value": value})
    assert encode(decode_item(payload)) == payload


@pytest.mark.parametrize(
    ("item", "stored"),
    [
        ({"a": (1, (2, 3))}, {"a": [1, [2, 3]]}),
        (OrderedDict(a=OrderedDict(b=1)), {"a": {"b": 1}}),
        (MappingProxyType({"a": "é"}), {"a": "é"}),
        ({Text("a"): Text("é"), "b": Real(1e16)}, {"a": "é", "b": 1e16}),
        ({"a": enum.IntEnum("E", "ONE").ONE}, {"a": 1}),
        ({}, {}),
    ],
    ids=str,
)
def test_python_values_with_one_meaning_in_json_are_accepted(item: Any, stored: dict[str, Any]) -> None:
    """Tuples are lists, and subclasses of str, float and dict are what they derive from."""
    payload = encode(item)
    assert same(decode_item(payload), stored)
    assert body_digest(item, payload) == body_digest(stored, encode(stored))


# --- what is refused


@pytest.mark.parametrize("item", [None, 1, "text", [], [("a", 1)], b"{}", {"a"}, (), Colour.RED], ids=repr)
def test_an_item_that_is_no_object_is_refused(item: object) -> None:
    """An item is a JSON object; the error names the parameter and the type."""
    with pytest.raises(InvalidRequest, match=rf"items\[0\] must be a JSON object, not {type(item).__name__}"):
        encode(item)


@pytest.mark.parametrize(
    "value",
    [
        math.nan,
        math.inf,
        -math.inf,
        Real("nan"),
        datetime(2024, 1, 1, tzinfo=UTC),
        date(2024, 1, 1),
        b"bytes",
        bytearray(b"bytes"),
        memoryview(b"bytes"),
        {1, 2},
        frozenset([1]),
        Decimal("1.5"),
        uuid4(),
        1j,
        Colour.RED,
        object(),
        len,
        int,
        iter([1]),
        MappingProxyType({"a": 1}),
    ],
    ids=lambda value: type(value).__name__,
)
def test_what_json_cannot_hold_is_refused_with_its_place(value: object) -> None:
    """Never turned into null or into a string; the error leads to the value."""
    with pytest.raises(
        InvalidRequest, match=r"items\[0\]\.a\[1\]\.b is .*, which JSON cannot hold"
    ) as caught:
        encode({"a": [0, {"b": value}]})
    assert caught.value.param == "items[0].a[1].b"


@pytest.mark.parametrize("key", [1, 1.5, None, True, b"a", ("a",), Colour.RED], ids=repr)
def test_keys_that_are_no_strings_are_refused(key: object) -> None:
    """1 and "1" would meet in one object."""
    for item in ({key: 1}, {key: 1, "1": 2}):
        with pytest.raises(InvalidRequest, match=r"items\[0\]\.a has a key that is not a string"):
            encode({"a": item})


@pytest.mark.parametrize("text", [HIGH + LOW, "a" + HIGH + LOW + "b", LOW + HIGH + LOW], ids=ascii)
def test_a_surrogate_pair_is_refused_where_it_would_come_back_as_another_string(text: str) -> None:
    """JSON reads the two escapes as one character, so such a string cannot come back equal."""
    for item in ({"a": text}, {"a": {text: 1}}):
        with pytest.raises(InvalidRequest, match="surrogate pair") as caught:
            encode(item)
        assert caught.value.param == ("items[0].a")


@pytest.mark.parametrize("sign", [1, -1])
def test_integers_have_a_limit_of_digits_which_the_error_names(sign: int) -> None:
    """4,300 digits come back; one more could be written and never be read again."""
    longest = sign * (10**MAX_INTEGER_DIGITS - 1)
    assert decode_item(encode({"a": longest})) == {"a": longest}
    with pytest.raises(TooLarge, match=r"items\[0\]\.a has more than 4300 digits, the limit"):
        encode({"a": sign * 10**MAX_INTEGER_DIGITS})


# --- depth


@pytest.mark.parametrize("lists", [False, True])
@pytest.mark.parametrize("leaf", ["a", HIGH], ids=ascii)
def test_nesting_is_accepted_up_to_the_limit(leaf: str, *, lists: bool) -> None:
    """100 levels of objects or lists, the item's own included, with and without a lone surrogate."""
    item = {**nested(MAX_ITEM_DEPTH, lists=lists), "leaf": leaf}
    assert same(decode_item(encode(item)), item)


@pytest.mark.parametrize("lists", [False, True])
@pytest.mark.parametrize("levels", [101, 102, 500, 5_000, 100_000])
def test_nesting_over_the_limit_is_refused_with_the_limit(levels: int, *, lists: bool) -> None:
    """One level more or a hundred thousand: the same error, and no RecursionError."""
    with pytest.raises(TooLarge, match=r"items\[0\] is nested more than 100 levels deep, the limit"):
        encode(nested(levels, lists=lists), 16 * MIB)


def test_wide_items_are_not_taken_for_deep_ones() -> None:
    """Many brackets side by side, or within a string, are no nesting."""
    item = {"a": [{} for _ in range(5_000)], "text": "[" * 5_000 + "{" * 5_000}
    assert same(decode_item(encode(item)), item)


def test_an_item_that_holds_itself_is_refused_at_once() -> None:
    """A cycle is nested without end; one that branches must not be followed into every branch."""
    branching: list[Any] = []
    branching += [branching, branching]
    cycle: dict[str, Any] = {}
    cycle["a"] = cycle
    for item in ({"a": branching}, cycle):
        with pytest.raises(TooLarge, match="nested more than 100 levels"):
            encode(item)


# --- size


@pytest.mark.parametrize("filler", ["x", "é", "😀", HIGH, "\0"], ids=ascii)
def test_the_byte_limit_is_exact_and_named(filler: str) -> None:
    """An item of exactly the limit is accepted; one byte more is refused with both numbers."""
    item = {"text": filler * 100}
    exact = len(encode(item))
    assert same(decode_item(encode(item, exact)), item)
    message = rf"items\[0\] is {exact} bytes of JSON; the limit is {exact - 1} \(max_item_bytes\)"
    with pytest.raises(TooLarge, match=message):
        encode(item, exact - 1)


def test_one_mebibyte_is_accepted_and_one_byte_more_is_not() -> None:
    """The default limit, to the byte."""
    overhead = len(b'{"text":""}')
    item = {"text": "x" * (MIB - overhead)}
    assert len(encode(item)) == MIB
    with pytest.raises(TooLarge, match="1048577 bytes of JSON; the limit is 1048576"):
        encode({"text": item["text"] + "x"})


# --- reading


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ('{"a":1,"a":2}', {"a": 2}),
        ('{"a":1,"a":"\\ud83d"}', {"a": HIGH}),
        ('{"a":{"b":1,"b":[],"c":0}}', {"a": {"b": [], "c": 0}}),
        (' {"a" : [ 1 , 2 ] } ', {"a": [1, 2]}),
        ('{"\\u0061":"\\u00e9\\/"}', {"a": "é/"}),
        ('{"a":"\\ud83d\\ude00"}', {"a": "😀"}),
        ('{"a":1E2}', {"a": 100.0}),
        ('{"a":123456789012345678901234567890}', {"a": 123456789012345678901234567890}),
    ],
)
def test_json_of_other_writers_is_read_as_json_says(text: str, value: dict[str, Any]) -> None:
    """The last of duplicate keys counts, with both readers; white space and escapes do not matter."""
    assert same(decode_item(text), value)
    assert same(decode_item(text.encode()), value)


# --- equality


@given(odd_values, st.data())
def test_the_digest_does_not_depend_on_the_order_of_keys(value: Any, data: st.DataObject) -> None:
    """A client that writes its keys in another order repeats the same item."""
    item = {"value": value, "b": 1, "a": 2}
    other = shuffled(item, data)
    assert body_digest(item, encode(item)) == body_digest(other, encode(other))
    assert equal_as_json(encode(item), encode(other).decode())


@given(near, near)
def test_the_digest_differs_for_different_values(one: Any, other: Any) -> None:
    """1, 1.0, true and "1" are four values, and so are null, an empty list and a missing key."""
    items = {"value": one}, {"value": other}
    payloads = [encode(item) for item in items]
    digests = [body_digest(item, payload) for item, payload in zip(items, payloads, strict=True)]
    assert (digests[0] == digests[1]) == same(one, other)
    assert equal_as_json(*payloads) == same(one, other)


@given(odd_values)
def test_the_digest_is_that_of_the_stored_item(value: Any) -> None:
    """The same 8 bytes from the item that came in and from the payload that was read back."""
    item = {"value": value}
    payload = encode(item)
    digest = body_digest(item, payload)
    assert len(digest) == 8
    assert digest == body_digest(decode_item(payload), payload)


@given(odd_values)
def test_the_same_value_in_another_writing_is_equal(value: Any) -> None:
    """Escapes, white space and key order of another JSON writer change nothing."""
    item = {"b": value, "a": "é"}
    other = json.dumps(item, sort_keys=True, indent=1)
    assert equal_as_json(encode(item), other)
    assert equal_as_json(other, encode(item).decode())


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ('{"a":1}', '{"a":1.0}'),
        ('{"a":1}', '{"a":true}'),
        ('{"a":0}', '{"a":false}'),
        ('{"a":0}', '{"a":null}'),
        ('{"a":null}', "{}"),
        ('{"a":[1,2]}', '{"a":[2,1]}'),
        ('{"a":18446744073709551616}', '{"a":18446744073709551617}'),
        ('{"a":"\\ud83d"}', '{"a":"\\\\ud83d"}'),
        ('{"a":"\\ud83d"}', '{"a":"\\ude00"}'),
        ('{"a":"e\\u0301"}', '{"a":"\\u00e9"}'),
    ],
)
def test_different_items_are_never_taken_for_a_repeat(one: str, other: str) -> None:
    """A second body under a known id must be seen as another one."""
    assert not equal_as_json(one, other)


def test_digests_never_change() -> None:
    """Literal values: a retry after an upgrade must not look like another body."""
    pinned: list[tuple[dict[str, Any], str]] = [
        ({"role": "user", "content": "hi"}, "a9a3fe7c2ddc12d3"),
        ({"content": "é😀", "role": "user", "n": [1, 1.5, None, True]}, "0f8f02887278dbcd"),
        ({"a": 2**64}, "243739b0064378a2"),
        ({"a": chr(0xD800)}, "c90b693ddd66541e"),
    ]
    assert [body_digest(item, encode(item)).hex() for item, _ in pinned] == [digest for _, digest in pinned]
