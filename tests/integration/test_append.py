"""Appends: receipts, ids, conditions, levels, limits, and what an append never does."""

from __future__ import annotations

import asyncio
import json
import time
from collections import OrderedDict
from typing import Any

import asyncpg
import pytest
from redis.asyncio import Redis

from buffer import (
    Buffer,
    Conflict,
    InvalidRequest,
    NotFound,
    OutcomeUnknown,
    Overloaded,
    PreconditionFailed,
    RedisUnavailable,
    Settings,
    TooLarge,
    Unavailable,
)
from buffer.embedded import EmbeddedServers
from tests.support.paths import on_path
from tests.support.polling import eventually


def message(text: str) -> dict[str, Any]:
    return {"role": "user", "content": text}


async def _ids(buffer: Buffer, conversation: str = "c") -> list[str]:
    return [item.id for item in (await buffer.conversation(conversation).items(limit=1_000)).items]


# --- ids and receipts


async def test_receipt_names_id_position_level_and_path(patient: Buffer) -> None:
    """A first append is acked at its level, by the stream, and is no duplicate."""
    receipt = await patient.conversation("c").append(message("hi"), id="m-1")
    assert (receipt.id, receipt.level, receipt.path, receipt.duplicate) == (
        "m-1",
        "buffered",
        "stream",
        False,
    )
    assert receipt.position > 0


@pytest.mark.parametrize(
    ("item", "prefix"),
    [
        ({"role": "user", "content": "x"}, "msg_"),
        ({"type": "message"}, "msg_"),
        ({"type": "function_call"}, "fc_"),
        ({"type": "function_call_output"}, "fco_"),
        ({"type": "reasoning"}, "rs_"),
        ({"type": "telepathy"}, "item_"),
        ({}, "item_"),
    ],
)
async def test_made_id_carries_the_prefix_of_the_type(
    patient: Buffer, item: dict[str, Any], prefix: str
) -> None:
    """An item without an id gets one that says what it is, and keeps its body as it was."""
    receipt = await patient.conversation("c").append(item)
    head, _, digits = receipt.id.rpartition("_")
    assert (head + "_", len(digits), int(digits, 16) > 0) == (prefix, 32, True)
    (read,) = (await patient.conversation("c").items()).items
    assert read == item
    assert read.id == receipt.id


async def test_item_may_bring_its_own_id(patient: Buffer) -> None:
    """The body's id is the item's id; another one beside it is refused."""
    conversation = patient.conversation("c")
    assert (await conversation.append({"id": "own", "role": "user"})).id == "own"
    with pytest.raises(InvalidRequest, match="beside it"):
        await conversation.append({"id": "own", "role": "user"}, id="other")
    assert await _ids(patient) == ["own"]


async def test_positions_of_a_batch_ascend_by_one(patient: Buffer) -> None:
    """One receipt an item, in the order of the items."""
    receipts = await patient.conversation("c").extend([message(str(i)) for i in range(5)], ids=list("abcde"))
    assert [r.id for r in receipts] == list("abcde")
    assert [r.position - receipts[0].position for r in receipts] == [0, 1, 2, 3, 4]


# --- idempotency


@pytest.mark.parametrize("flushed", [False, True])
async def test_repeat_gets_the_first_receipt_again(patient: Buffer, flushed: bool) -> None:
    """The same id and body, in any order of keys, is one item; flushed or not."""
    conversation = patient.conversation("c")
    first = await conversation.append({"a": 1, "b": [2]}, id="m-1")
    if flushed:
        await patient.flush()
    again = await conversation.append({"b": [2], "a": 1}, id="m-1")
    assert (again.position, again.duplicate, first.duplicate) == (first.position, True, False)
    assert await _ids(patient) == ["m-1"]


@pytest.mark.parametrize("flushed", [False, True])
async def test_same_id_with_another_body_is_a_conflict(patient: Buffer, flushed: bool) -> None:
    """The id is named, and the first body stays."""
    conversation = patient.conversation("c")
    await conversation.append({"n": 1}, id="m-1")
    if flushed:
        await patient.flush()
    with pytest.raises(Conflict, match="m-1") as caught:
        await conversation.append({"n": 1.0}, id="m-1")
    assert caught.value.ids == ["m-1"]
    assert [dict(i) for i in (await conversation.items()).items] == [{"n": 1}]


async def test_repeated_batch_gets_its_receipts_and_partly_known_batch_is_a_conflict(patient: Buffer) -> None:
    """All known: the first receipts. Some known: a conflict, and nothing of it is stored."""
    conversation = patient.conversation("c")
    first = await conversation.extend([message("1"), message("2")], ids=["a", "b"])
    again = await conversation.extend([message("1"), message("2")], ids=["a", "b"])
    assert [(r.position, r.duplicate) for r in again] == [(r.position, True) for r in first]
    with pytest.raises(Conflict, match="part of this batch"):
        await conversation.extend([message("2"), message("3")], ids=["b", "c"])
    assert await _ids(patient) == ["a", "b"]


async def test_concurrent_repeats_are_stored_once(patient: Buffer) -> None:
    """Fifty tasks with one id: one first receipt, 49 duplicates of it."""
    conversation = patient.conversation("c")
    receipts = await asyncio.gather(*(conversation.append(message("x"), id="m-1") for _ in range(50)))
    assert sorted(receipt.duplicate for receipt in receipts) == [False] + [True] * 49
    assert len({receipt.position for receipt in receipts}) == 1
    assert await _ids(patient) == ["m-1"]


async def test_same_id_is_free_in_another_conversation_and_tenant(patient: Buffer) -> None:
    """Ids are unique within their conversation only."""
    for tenant, name in [("t1", "a"), ("t1", "b"), ("t2", "a")]:
        receipt = await patient.conversation(name, tenant=tenant).append(message(name), id="m-1")
        assert not receipt.duplicate


@pytest.mark.parametrize("bad", ["", ".", "..", "a/b", "a\nb", "\x7f", "\ud800", 7])
async def test_impossible_ids_are_refused_before_anything_is_sent(patient: Buffer, bad: Any) -> None:
    """Of a batch with one bad id nothing is stored."""
    conversation = patient.conversation("c")
    with pytest.raises(InvalidRequest, match=r"items\[1\]\.id"):
        await conversation.extend([message("1"), message("2")], ids=["ok", bad])
    with pytest.raises(InvalidRequest, match="conversation"):
        patient.conversation(bad)
    assert not await _ids(patient)


async def test_two_equal_ids_in_one_batch_are_refused(patient: Buffer) -> None:
    """A batch names each id once."""
    with pytest.raises(InvalidRequest, match="same id"):
        await patient.conversation("c").extend([message("1"), message("1")], ids=["a", "a"])


# --- if_match


@pytest.mark.parametrize("flushed", [False, True], ids=["warm", "cold"])
async def test_if_match_lets_only_the_last_position_pass(patient: Buffer, flushed: bool) -> None:
    """Unflushed or flushed, another position fails and names the last one."""
    conversation = patient.conversation("c")
    first = await conversation.append(message("1"))
    last = await conversation.append(message("2"), if_match=first.position)
    if flushed:
        await patient.flush()
    for wrong in (0, first.position, last.position + 1):
        with pytest.raises(PreconditionFailed) as caught:
            await conversation.append(message("no"), if_match=wrong)
        assert caught.value.last_position == last.position
    await conversation.append(message("3"), if_match=last.position)
    assert [i["content"] for i in (await conversation.items()).items] == ["1", "2", "3"]


async def test_if_match_zero_means_no_items_yet(patient: Buffer) -> None:
    """The first append passes, the second does not."""
    conversation = patient.conversation("c")
    first = await conversation.append(message("1"), if_match=0)
    with pytest.raises(PreconditionFailed) as caught:
        await conversation.append(message("2"), if_match=0)
    assert caught.value.last_position == first.position


@pytest.mark.parametrize("flushed", [False, True], ids=["warm", "cold"])
async def test_known_id_is_answered_before_if_match(patient: Buffer, flushed: bool) -> None:
    """A retry whose first try had succeeded gets its receipt, though the last position has moved on."""
    conversation = patient.conversation("c")
    first = await conversation.append(message("1"), if_match=0, id="m-1")
    if flushed:
        await patient.flush()
    assert (await conversation.append(message("1"), if_match=0, id="m-1")).position == first.position


@pytest.mark.parametrize("state", ["new", "unflushed", "flushed", "while flushing"])
async def test_of_racing_appends_with_one_if_match_exactly_one_passes(patient: Buffer, state: str) -> None:
    """Compare-and-append is atomic, also where Postgres has to be asked and a flush comes in between."""
    for number in range(5 if state == "while flushing" else 2):
        conversation = patient.conversation(f"c{number}")
        last = 0 if state == "new" else (await conversation.append(message("0"))).position
        if state == "flushed":
            await patient.flush()
        flush = patient.flush() if state == "while flushing" else asyncio.sleep(0)
        racers = (conversation.append(message(str(i)), if_match=last) for i in range(20))
        _, *outcomes = await asyncio.gather(flush, *racers, return_exceptions=True)
        assert sum(not isinstance(outcome, Exception) for outcome in outcomes) == 1
        assert sum(isinstance(outcome, PreconditionFailed) for outcome in outcomes) == 19


# --- replace_after


async def test_replace_after_removes_flushed_and_unflushed_items_in_one_step(
    patient: Buffer, postgres: asyncpg.Connection
) -> None:
    """Visible at once, before and after the flush; the removed ids stay taken."""
    conversation = patient.conversation("c")
    await conversation.extend([message(str(i)) for i in range(4)], ids=list("abcd"))
    await patient.flush()
    await conversation.extend([message(str(i)) for i in range(2)], ids=list("ef"))
    await conversation.extend([message("new"), message("newer")], ids=list("xy"), replace_after="b")
    for _ in range(2):
        assert await _ids(patient) == ["a", "b", "x", "y"]
        assert [i.id for i in (await conversation.context(3)).items] == ["b", "x", "y"]
        with pytest.raises(NotFound):
            await conversation.items(after="e")
        await patient.flush()
    rows = await postgres.fetch("select item_id from buffer.items where data is null order by position")
    assert [row["item_id"] for row in rows] == ["c", "d", "e", "f"]


async def test_replace_after_an_unflushed_item_of_the_same_tail(patient: Buffer) -> None:
    """Regenerate: the answer is replaced, and replaced again, without a flush in between."""
    conversation = patient.conversation("c")
    await conversation.append(message("question"), id="q")
    for number in range(5):
        await conversation.append(message("answer"), id=f"a-{number}", replace_after="q")
        assert await _ids(patient) == ["q", f"a-{number}"]
    await patient.flush()
    assert await _ids(patient) == ["q", "a-4"]


async def test_replace_after_an_unknown_or_removed_item_is_not_found(patient: Buffer) -> None:
    """Nothing is stored then."""
    conversation = patient.conversation("c")
    await conversation.extend([message("1"), message("2")], ids=["a", "b"])
    await conversation.append(message("3"), id="c", replace_after="a")
    for missing in ("b", "nobody"):
        with pytest.raises(NotFound, match=missing):
            await conversation.append(message("4"), replace_after=missing)
    assert await _ids(patient) == ["a", "c"]


# --- levels


async def test_stored_is_acked_only_with_the_row_in_postgres(
    patient: Buffer, postgres: asyncpg.Connection
) -> None:
    """And at once, however long the flush interval is."""
    began = time.monotonic()
    receipts = await patient.conversation("c").extend([message("1"), message("2")], durability="stored")
    rows = await postgres.fetch("select item_id from buffer.items order by position")
    assert [row["item_id"] for row in rows] == [r.id for r in receipts]
    assert {r.level for r in receipts} == {"stored"}
    assert time.monotonic() - began < 5


async def test_stored_that_cannot_be_reached_is_unknown_with_the_level_reached(settings: Settings) -> None:
    """Without a flusher: the item is buffered, and the answer says so; never a weaker ack."""
    async with Buffer.connect(settings, flusher=True):
        pass  # a flusher has been here, and is gone
    async with Buffer.connect(settings) as buffer:
        with pytest.raises(OutcomeUnknown) as caught:
            await buffer.conversation("c").append(message("1"), id="m-1", durability="stored", timeout=0.3)
        assert (caught.value.ids, caught.value.level) == (["m-1"], "buffered")
        assert await _ids(buffer) == ["m-1"]


@pytest.mark.parametrize("level", ["eternal", None])
async def test_level_that_does_not_exist_is_refused(patient: Buffer, level: Any) -> None:
    """Before anything is sent."""
    with pytest.raises(InvalidRequest, match="durability"):
        await patient.conversation("c").append(message("1"), durability=level)
    assert not await _ids(patient)


# --- time limits and bounds


async def test_silent_redis_ends_an_append_within_its_limit(
    own_servers: EmbeddedServers, own_settings: Settings
) -> None:
    """Sent and not answered: unknown. Not sent: certainly not stored, and to be tried again."""
    settings = own_settings.model_copy(update={"append_timeout_seconds": 0.5, "redis_timeout_seconds": 5.0})
    async with Buffer.connect(settings, flusher=True) as buffer:
        conversation = buffer.conversation("c")
        await conversation.append(message("0"), id="m-0")
        own_servers.redis.pause()
        try:
            began = time.monotonic()
            outcomes = await asyncio.gather(
                *(_append_later(buffer, f"m-{number}") for number in range(1, 9)), return_exceptions=True
            )
            assert time.monotonic() - began < 2
        finally:
            own_servers.redis.resume()
        kinds = [type(outcome) for outcome in outcomes]
        assert set(kinds) == {OutcomeUnknown, RedisUnavailable}
        unknown = {f"m-{i}" for i, kind in enumerate(kinds, 1) if kind is OutcomeUnknown}
        assert all(o.ids == [f"m-{i}"] for i, o in enumerate(outcomes, 1) if isinstance(o, OutcomeUnknown))
        assert all(o.retry_after > 0 for o in outcomes if isinstance(o, RedisUnavailable))
        await conversation.append(message("9"), id="m-9", timeout=10)
        assert set(await _ids(buffer)) - {"m-0", "m-9"} <= unknown
        for item_id in unknown:
            await conversation.append(message(item_id), id=item_id)
        assert sorted(await _ids(buffer)) == sorted(["m-0", *unknown, "m-9"])


async def _append_later(buffer: Buffer, item_id: str) -> None:
    # One event-loop turn apart: each is a round trip of its own, until there is no room for more.
    for _ in range(5 * int(item_id[2:])):
        await asyncio.sleep(0)
    await buffer.conversation("c").append(message(item_id), id=item_id)


async def test_full_queue_refuses_at_once_and_says_when_to_retry(
    own_servers: EmbeddedServers, own_settings: Settings
) -> None:
    """Bounded by count and by bytes; what was refused was never stored."""
    settings = own_settings.model_copy(update={"append_queue_max": 50, "append_queue_max_bytes": 1 << 20})
    async with Buffer.connect(settings, flusher=True) as buffer:
        conversation = buffer.conversation("c")
        await conversation.append(message("first"))
        own_servers.redis.pause()
        try:
            waiting = [
                asyncio.create_task(conversation.append(message(str(i)), id=f"m-{i}")) for i in range(50)
            ]
            await eventually(lambda: buffer.runtime.coalescer.operations == 50)
            with pytest.raises(Overloaded, match="append_queue_max") as caught:
                await conversation.append(message("one too many"))
            assert 0 < caught.value.retry_after <= 5
        finally:
            own_servers.redis.resume()
        await asyncio.gather(*waiting)
        own_servers.redis.pause()
        try:
            big = [asyncio.create_task(conversation.append(message("x" * 300_000))) for _ in range(3)]
            await eventually(lambda: buffer.runtime.coalescer.operations == 3)
            with pytest.raises(Overloaded, match="append_queue_max_bytes"):
                await conversation.append(message("x" * 300_000))
        finally:
            own_servers.redis.resume()
        await asyncio.gather(*big)
        assert len(await _ids(buffer)) == 1 + 50 + 3


async def test_closing_buffer_answers_everybody(settings: Settings, postgres: asyncpg.Connection) -> None:
    """Whoever waits while the process closes gets an error that says what is known; nobody hangs."""
    async with Buffer.connect(settings) as buffer:
        conversation = buffer.conversation("c")
        # No flusher is there to open what closes here, so appends wait.
        await postgres.execute("update buffer.shards set mode = 'closing', path_epoch = path_epoch + 1")
        await on_path(buffer, "closing")
        never_sent = asyncio.create_task(conversation.append(message("1")))
        await eventually(lambda: buffer.runtime.coalescer.operations == 1)
    with pytest.raises(RedisUnavailable):
        await asyncio.wait_for(never_sent, 2)
    async with Buffer.connect(settings, flusher=True):
        pass
    async with Buffer.connect(settings) as buffer:
        conversation = buffer.conversation("c")
        receipt = await conversation.append(message("2"))
        flushing = asyncio.create_task(conversation.flushed(receipt))
        storing = asyncio.create_task(conversation.append(message("3"), durability="stored"))
        await eventually(lambda: len(buffer.runtime.marks._waiters[conversation._target.shard]) == 2)
    with pytest.raises(Unavailable):
        await asyncio.wait_for(flushing, 2)
    with pytest.raises(OutcomeUnknown) as caught:
        await asyncio.wait_for(storing, 2)
    assert caught.value.level == "buffered"
    for late in (conversation.append(message("4")), conversation.items(), conversation.flushed(receipt)):
        with pytest.raises(Unavailable):
            await asyncio.wait_for(late, 2)


async def test_append_that_was_sent_before_closing_is_of_unknown_outcome(
    own_servers: EmbeddedServers, own_settings: Settings
) -> None:
    """Redis may have it: so "nothing was stored" would be wrong."""
    async with Buffer.connect(own_settings, flusher=True):
        pass
    async with Buffer.connect(own_settings) as buffer:
        await buffer.conversation("c").append(message("1"))
        own_servers.redis.pause()
        sent = asyncio.create_task(buffer.conversation("c").append(message("2"), id="m-2"))
        await eventually(lambda: buffer.runtime.coalescer.operations == 1)
        await asyncio.sleep(0)
    own_servers.redis.resume()
    with pytest.raises(OutcomeUnknown) as caught:
        await asyncio.wait_for(sent, 2)
    assert caught.value.ids == ["m-2"]


def _of_bytes(size: int) -> dict[str, Any]:
    return {"content": "x" * (size - len(b'{"content":""}'))}


async def test_item_of_exactly_one_mebibyte_is_kept_and_one_byte_more_is_refused(
    patient: Buffer, settings: Settings
) -> None:
    """The error names the limit; through the tail and through Postgres the item comes back equal."""
    conversation = patient.conversation("c")
    assert settings.max_item_bytes == 1 << 20
    item = _of_bytes(1 << 20)
    await conversation.append(item, id="m-1")
    with pytest.raises(TooLarge, match="1048576"):
        await conversation.append(_of_bytes((1 << 20) + 1))
    assert (await conversation.items()).items == [item]
    await patient.flush()
    assert (await conversation.items()).items == [item]


async def test_batch_is_limited_in_bytes_and_in_items(patient: Buffer, settings: Settings) -> None:
    """Exactly the limit passes, whole; more is refused, and the error names the limit."""
    conversation = patient.conversation("c")
    full = [_of_bytes(1 << 20)] * (settings.max_batch_bytes >> 20)
    assert len(await conversation.extend(full)) == len(full)
    with pytest.raises(TooLarge, match=str(settings.max_batch_bytes)):
        await conversation.extend([*full, {}])
    most = [message(str(i)) for i in range(settings.max_batch_items)]
    assert len(await conversation.extend(most)) == settings.max_batch_items
    with pytest.raises(TooLarge, match=str(settings.max_batch_items)):
        await conversation.extend([*most, message("one more")])
    with pytest.raises(TooLarge):
        await conversation.extend([])
    await patient.flush()
    assert len(await _ids(patient)) == len(full) + len(most)


async def test_ids_of_200_characters_are_kept_and_longer_ones_refused(patient: Buffer) -> None:
    """Of any character, four bytes each: tenant, conversation, user and item id, up to Postgres's keys."""
    longest = "\N{GRINNING FACE}" * 200
    conversation = patient.conversation(longest, tenant=longest, user=longest)
    await conversation.append(message("1"), id=longest, durability="stored")
    assert [item.id for item in (await conversation.items()).items] == [longest]
    with pytest.raises(TooLarge, match="200"):
        await conversation.append(message("2"), id=longest + "x")
    with pytest.raises(TooLarge, match="200"):
        patient.conversation(longest + "x")


# --- values


ODD = {
    "nul": {"content": "a\u0000b"},
    "nul in a key": {"a\u0000b": "\u0000"},
    "lone high surrogate": {"content": "a\ud83d"},
    "lone low surrogate": {"content": "\ude00b", "\ude00": 1},
    "emoji": {"content": "\N{GRINNING FACE}\N{ZERO WIDTH JOINER}\N{FEMALE SIGN}"},
    "line and paragraph separators": {"content": "\u2028\u2029\u0085\ufeff\ufffe"},
    "all control characters": {"content": "".join(map(chr, range(32))) + "\x7f\x80"},
    "2^63 and more": {"n": [2**63, -(2**63) - 1, 2**64, 10**400, 2**53 + 1]},
    "floats": {"x": [0.1, 1e308, 5e-324, 1.0, 1e22]},
    "deep": {"d": json.loads("[" * 99 + "]" * 99)},
    "empty content": {"role": "user", "content": ""},
    "empty values": {"a": "", "b": [], "c": {}, "d": None, "e": False, "": ""},
    "nothing": {},
    "unknown type": {"type": "telepathy", "waves": [{"hz": 7}]},
    "backslashes": {"content": 'a\\b\\\\c"\\u0041\\.\t\r\n\b\f'},
    "postgres copy markers": {"content": "\\N\n\\.\n", "\\.": "\\N"},
    "looks like a header": {"content": "1/i/t/c/m/u/0//+/41"},
}


@pytest.mark.parametrize("name", ODD)
async def test_odd_value_comes_back_equal_from_stream_and_postgres(
    patient: Buffer, postgres: asyncpg.Connection, name: str
) -> None:
    """What is accepted is what is read, unflushed, flushed by COPY, and flushed the staged way."""
    item = ODD[name]
    conversation = patient.conversation("c")
    await conversation.append(item, id="m-1")
    (unflushed,) = (await conversation.items()).items
    await patient.flush()
    (flushed,) = (await conversation.items()).items
    for read in (unflushed, flushed):
        assert read == item
        assert json.dumps(read) == json.dumps(item)  # 1 and 1.0, and the order of keys
    assert (await conversation.append(item, id="m-1")).duplicate
    # A row that is there already sends the next batch through the staged path.
    await _occupy(postgres, "staged")
    await patient.conversation("staged").extend([message("taken"), item], ids=["taken", "m-1"])
    await patient.flush()
    assert (await patient.conversation("staged").items(after="taken")).items == [item]


async def _occupy(postgres: asyncpg.Connection, conversation: str) -> None:
    await postgres.execute(
        "insert into buffer.items values ('default', $1, 1, 'taken', now(), $2)",
        conversation,
        json.dumps(message("taken")),
    )


@pytest.mark.parametrize(
    ("item", "error"),
    [
        ({"d": json.loads("[" * 100 + "]" * 100)}, "100 levels"),
        ({"n": 10**4_300}, "4300 digits"),
        ({"x": float("nan")}, "nan"),
        ({"x": float("inf")}, "inf"),
        ({"x": b"bytes"}, "bytes"),
        ({7: "x"}, "key"),
        ({"s": "\ud83d\ude00"}, "surrogate pair"),
        ({"s": {1, 2}}, "set"),
        (["not", "an", "object"], "JSON object"),
        ("text", "JSON object"),
    ],
)
async def test_what_json_cannot_hold_is_refused_with_its_reason(
    patient: Buffer, item: Any, error: str
) -> None:
    """Of a batch with one such item nothing is stored."""
    conversation = patient.conversation("c")
    with pytest.raises(InvalidRequest, match=error) as caught:
        await conversation.extend([message("fine"), item])
    assert "items[1]" in str(caught.value)
    assert not await _ids(patient)


async def test_duplicate_keys_in_json_text_are_one_key_before_they_come_here(patient: Buffer) -> None:
    """A parsed object holds the last of equal keys, and that is what is stored."""
    item = json.loads('{"role": "user", "content": "first", "content": "last"}')
    conversation = patient.conversation("c")
    await conversation.append(item, durability="stored")
    assert (await conversation.items()).items == [{"role": "user", "content": "last"}]


async def test_any_mapping_is_an_item(patient: Buffer) -> None:
    """And comes back as a dict."""
    conversation = patient.conversation("c")
    await conversation.append(OrderedDict(role="user", parts=(1, 2)))
    assert (await conversation.items()).items == [{"role": "user", "parts": [1, 2]}]


# --- what an append does not do


async def test_appends_never_query_postgres(settings: Settings) -> None:
    """New ids, repeats, conflicts and warm conditions are answered by Redis alone."""
    async with Buffer.connect(settings, flusher=True), Buffer.connect(settings) as client:
        conversation = client.conversation("c", user="u")
        await conversation.append(message("0"), id="m-0")
        queries = 0

        def count() -> None:
            nonlocal queries
            queries += 1

        client.runtime.database.on_query = count
        for number in range(1, 50):
            await conversation.append(message(str(number)), id=f"m-{number}")
        await conversation.extend([message("x")] * 10)
        await conversation.append(message("0"), id="m-0")
        with pytest.raises(Conflict):
            await conversation.append(message("other"), id="m-0")
        assert (await conversation.append(message("stored"), durability="stored")).level == "stored"
        assert queries == 0
        await conversation.items()
        assert queries > 0, "the counter counts"


async def test_lone_append_does_not_wait_for_company(patient: Buffer) -> None:
    """One after the other, each takes a round trip and not a tick of anything."""
    conversation = patient.conversation("c")
    seconds = []
    for number in range(200):
        began = time.perf_counter()
        await conversation.append(message(str(number)))
        seconds.append(time.perf_counter() - began)
    assert sorted(seconds)[len(seconds) // 2] < 0.005


async def test_order_of_positions_is_the_order_of_acks_in_one_conversation(patient: Buffer) -> None:
    """200 tasks, five appends each: acks come in ascending positions, and reads in the same order."""
    conversation = patient.conversation("c")
    acks: list[tuple[int, str]] = []

    async def append(task: int) -> None:
        for number in range(5):
            receipt = await conversation.append(message(f"{task} {number}"))
            acks.append((receipt.position, receipt.id))

    async with asyncio.TaskGroup() as tasks:
        for task in range(200):
            tasks.create_task(append(task))
    assert acks == sorted(acks)
    assert len(acks) == 1_000
    assert await _ids(patient) == [item_id for _, item_id in acks]
    await patient.flush()
    assert await _ids(patient) == [item_id for _, item_id in acks]


async def test_scripts_that_redis_forgot_are_brought_along_again(patient: Buffer, redis: Redis) -> None:
    """SCRIPT FLUSH in the middle of appends is not noticed."""
    conversation = patient.conversation("c")
    for number in range(20):
        await conversation.append(message(str(number)))
        await redis.script_flush()
    await patient.flush()
    assert [i["content"] for i in (await conversation.items()).items] == [str(i) for i in range(20)]
