"""Records: a header gives back what was put in, and anything else is recognized as not ours to read."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from buffer.model.ids import check_id
from buffer.model.position import MAX_POSITION, MAX_SEQUENCE
from buffer.model.record import (
    DELETE,
    ERASE,
    ITEM,
    Record,
    UnknownRecordFormat,
    batch_continues,
    decode_entry,
    encode_header,
    split_header,
)

from .strategies import ids

LAST_MS = 99_999_999_999_999  # in the year 5138
YEAR_2200_MS = 7_258_118_400_000
HEADER = b"1/i/acme/c7/m-91/u42/1732368000123/1099511627775/+/41"

times = st.integers(0, LAST_MS)
cuts = st.none() | st.sampled_from([0, MAX_POSITION]) | st.integers(0, MAX_POSITION)
headers = st.fixed_dictionaries(
    {
        "tenant": ids,
        "conversation": ids,
        "item_id": ids,
        "user": st.none() | ids,
        "created_ms": times,
        "cut": cuts,
        "batch_continues": st.booleans(),
        "kind": st.sampled_from([ITEM, DELETE, ERASE]),
    }
)
# What the append script adds to a header: the number of the entry before it, if there is one.
befores = st.just(b"") | st.integers(0, MAX_SEQUENCE).map(b"%d".__mod__)


def header_of(*, tenant: str = "t", conversation: str = "c", **fields: Any) -> bytes:
    options = {"item_id": "i", "user": None, "created_ms": 0, "cut": None, "batch_continues": False}
    return encode_header(f"{tenant}/{conversation}", **(options | fields))


@given(headers, befores, st.integers(0, MAX_SEQUENCE), st.binary(max_size=30))
def test_a_record_holds_what_the_append_said(
    fields: dict[str, Any], before: bytes, sequence: int, data: bytes
) -> None:
    """Any allowed ids, any time and cut, with and without a user, and the payload as opaque bytes."""
    header = header_of(**fields) + before
    record = decode_entry(b"7-%d" % sequence, header, data)
    assert record == Record(sequence=sequence, data=data, **fields)
    assert record.conversation_key == f"{fields['tenant']}/{fields['conversation']}"
    assert batch_continues(header) == fields["batch_continues"]
    assert b"/".join(split_header((b"7-1", header, data))) == header


@given(st.integers(0, YEAR_2200_MS))
@example(1_732_368_000_123)
def test_the_time_of_acceptance_is_exact_to_the_millisecond(created_ms: int) -> None:
    """The time goes through a float, and no millisecond is lost in it."""
    record = decode_entry(b"1-0", header_of(created_ms=created_ms), b"{}")
    assert record.created_at == datetime(1970, 1, 1, tzinfo=UTC) + timedelta(milliseconds=created_ms)


def test_the_format_never_changes_under_its_version() -> None:
    """Literal bytes: what one release left in Redis, the next one has to flush."""
    fields: dict[str, Any] = {
        "tenant": "acme",
        "conversation": "c7",
        "item_id": "m-91",
        "user": "u42",
        "created_ms": 1732368000123,
        "cut": 1099511627775,
        "batch_continues": True,
    }
    assert header_of(**fields) + b"41" == HEADER
    assert header_of(tenant="acme", conversation="c7", item_id="m-91") == b"1/i/acme/c7/m-91//0///"
    assert decode_entry(b"3-17", HEADER, b"{}") == Record(sequence=17, data=b"{}", **fields)


@pytest.mark.parametrize(
    "header",
    [
        b"2/i/acme/c7/m-91/u42/5///",
        b"2/i/acme/c7/m-91/u42/5///7/more",
        b"2",
        b"11/i/acme/c7/m-91/u42/5///",
        b"01/i/acme/c7/m-91/u42/5///",
        b"0/i/acme/c7/m-91/u42/5///",
        b"/i/acme/c7/m-91/u42/5///",
        b'{"v":2}',
        b"\x02\x00\xff",
    ],
    ids=repr,
)
def test_another_format_version_is_recognized(header: bytes) -> None:
    """A newer release's record is named as such, with its entry id and its header, whatever its shape."""
    with pytest.raises(UnknownRecordFormat, match=r"record 7-12 has header b['\"]"):
        decode_entry(b"7-12", header, b"{}")
    with pytest.raises(UnknownRecordFormat, match=r"record 7-12 has header b['\"]"):
        split_header((b"7-12", header, b"{}"))


@pytest.mark.parametrize("kind", [b"x", b"I", b"ii", b"de", b""])
def test_another_kind_of_record_is_recognized(kind: bytes) -> None:
    """A kind that this release does not have is not taken for one that it has."""
    with pytest.raises(UnknownRecordFormat):
        decode_entry(b"7-12", HEADER.replace(b"/i/", b"/%s/" % kind), b"{}")


@pytest.mark.parametrize(
    "header",
    [
        b"",
        b"1",
        b"/" * 9,
        HEADER + b"/",
        HEADER.rpartition(b"/")[0],
        HEADER.replace(b"/41", b"/x"),
        HEADER.replace(b"/41", b"/-1"),
        HEADER.replace(b"acme", b""),
        HEADER.replace(b"c7", b""),
        HEADER.replace(b"m-91", b""),
        HEADER.replace(b"m-91", b"m/91"),
        HEADER.replace(b"m-91", b"m\xff91"),
        HEADER.replace(b"1732368000123", b""),
        HEADER.replace(b"1732368000123", b"soon"),
        HEADER.replace(b"1732368000123", b"1732368000.5"),
        HEADER.replace(b"1732368000123", b"-1"),
        HEADER.replace(b"1732368000123", b"%d" % (LAST_MS + 1)),
        HEADER.replace(b"1732368000123", b"9" * 5_000),
        HEADER.replace(b"1099511627775", b"x"),
        HEADER.replace(b"1099511627775", b"-5"),
        HEADER.replace(b"1099511627775", b"%d" % (MAX_POSITION + 1)),
        HEADER.replace(b"+", b"++"),
        HEADER.replace(b"+", b"x"),
        HEADER.replace(b"+", b" "),
    ],
    ids=lambda header: repr(header[:60]),
)
def test_a_damaged_header_is_recognized(header: bytes) -> None:
    """A damaged record holds its shard with a message; it neither passes nor stops the flusher."""
    with pytest.raises(UnknownRecordFormat, match="record 7-12 has header"):
        decode_entry(b"7-12", header, b"{}")


def test_the_message_about_a_header_is_short() -> None:
    """A header of a mebibyte does not fill the log."""
    with pytest.raises(UnknownRecordFormat) as caught:
        decode_entry(b"7-12", b"2/" + b"x" * (1 << 20), b"{}")
    assert len(str(caught.value)) < 200


fields = st.sampled_from(
    [b"1", b"2", b"i", b"d", b"", b"+", b"a", b"-1", b"5", b"\xff", b" 5", b"1_0", b"9" * 20]
)


@given(st.binary(max_size=60) | st.lists(fields, min_size=8, max_size=11).map(b"/".join))
def test_any_bytes_are_a_record_or_an_unknown_format(header: bytes) -> None:
    """There is no third outcome, and what passes can be written into Postgres."""
    try:
        record = decode_entry(b"7-12", header, b"{}")
    except UnknownRecordFormat:
        return
    assert all(map(check_id, (record.tenant, record.conversation, record.item_id), "tci"))
    assert 1970 <= record.created_at.year <= 9999
    assert 0 <= (record.replace_after or 0) <= MAX_POSITION


@given(st.binary(max_size=60) | st.lists(fields, max_size=11).map(b"/".join))
def test_any_header_can_be_asked_whether_its_batch_goes_on(header: bytes) -> None:
    """The flusher asks before it knows the format: a header of a newer release must not stop it."""
    assert batch_continues(header) in {True, False}


@given(headers, befores, st.integers(0, 9), st.integers(0, 9))
def test_a_lost_or_doubled_separator_is_never_read_as_another_record(
    fields: dict[str, Any], before: bytes, lose: int, double: int
) -> None:
    """Ten fields are ten fields: ids hold no separator that could make up for one."""
    parts = (header_of(**fields) + before).split(b"/")
    assert len(parts) == 10
    lost = b"/".join([*parts[:lose], *parts[lose + 1 :]])
    doubled = b"/".join([*parts[:double], b"", *parts[double:]])
    for damaged in (lost, doubled):
        with pytest.raises(UnknownRecordFormat):
            decode_entry(b"7-12", damaged, b"{}")
