"""Poison: what cannot be stored is kept with its reason, and its neighbours go on."""

from __future__ import annotations

import json
from pathlib import Path

import asyncpg
import pytest
from redis.asyncio import Redis

from buffer import Buffer, NotFound
from buffer.model.ids import id_digest
from buffer.model.record import encode_header
from buffer.store.dead_letters import DeadLetters
from tests.acceptance.test_commands import run

GOOD = {"role": "user", "content": "fine"}


async def _poison(buffer: Buffer, redis: Redis, conversation: str, item_id: str, payload: bytes) -> None:
    """An entry that no append of ours would write, put straight into the stream with its bookkeeping."""
    target = buffer.conversation(conversation)._target
    keys = buffer.runtime.shards.keys[target.shard]
    (backlog,) = await buffer.runtime.shards.peek([target.shard])
    before = (await redis.hget(keys.shard, target.key)) or b""
    header = encode_header(target.key, item_id, None, 1_732_368_000_123, None, False) + before
    entry = await redis.xadd(keys.stream, {"h": header, "d": payload}, id=f"{backlog.epoch}-*")
    sequence = entry.split(b"-")[1]
    await redis.hset(keys.shard, target.key, sequence)
    await redis.hincrby(keys.shard, "bytes", len(header) + len(payload))
    await redis.hset(keys.ids, id_digest(target.key, item_id), b"8 bytes." + sequence)


@pytest.mark.parametrize(
    "payload",
    [b'{"a":', b"\xff\xfe", b'{"a":"\xed\xa0\x80"}', b""],
    ids=["cut off", "no UTF-8", "surrogate", "empty"],
)
async def test_bad_row_is_isolated_and_its_neighbours_are_stored(
    patient: Buffer, postgres: asyncpg.Connection, redis: Redis, payload: bytes
) -> None:
    """Rows before, after and in other conversations are committed; the bad one is kept as it was."""
    conversation = patient.conversation("c")
    for number in range(20):
        await conversation.append(GOOD, id=f"before-{number}")
    await _poison(patient, redis, "c", "poison", payload)
    for number in range(20):
        await conversation.append(GOOD, id=f"after-{number}")
        await patient.conversation(f"other-{number}").append(GOOD)
    await patient.flush()
    assert await postgres.fetchval("select count(*) from buffer.items") == 60
    (letter,) = await DeadLetters(patient.runtime.database).page()
    assert (letter.conversation, letter.item_id, letter.payload) == ("c", "poison", payload)
    assert letter.reason
    assert patient.runtime.metrics["dead_lettered_turns_total"]._value.get() == 1
    await conversation.append(GOOD, durability="stored", timeout=10)


async def test_many_bad_rows_in_one_batch_are_all_found(
    patient: Buffer, postgres: asyncpg.Connection, redis: Redis
) -> None:
    """Every third of 60 rows is bad: 20 letters, 40 rows, one flush."""
    conversation = patient.conversation("c")
    for number in range(60):
        if number % 3:
            await conversation.append(GOOD, id=f"m-{number}")
        else:
            await _poison(patient, redis, "c", f"m-{number}", b"{")
    await patient.flush()
    letters = await DeadLetters(patient.runtime.database).page()
    assert [letter.item_id for letter in letters] == [f"m-{n}" for n in range(0, 60, 3)]
    assert await postgres.fetchval("select count(*) from buffer.items") == 40


async def test_reads_say_incomplete_until_the_letter_is_dealt_with(patient: Buffer, redis: Redis) -> None:
    """`complete` is False for that conversation only, and True again after a retry or a drop."""
    letters = DeadLetters(patient.runtime.database)
    for name in ("retried", "dropped", "untouched"):
        await patient.conversation(name).append(GOOD)
    for name in ("retried", "dropped"):
        await _poison(patient, redis, name, "poison", b"{")
    await patient.flush()
    assert not (await patient.conversation("retried").context()).complete
    assert not (await patient.conversation("dropped").items()).complete
    assert (await patient.conversation("untouched").context()).complete
    by_conversation = {letter.conversation: letter.id for letter in await letters.page()}
    outcome, reason = await letters.retry(by_conversation["retried"])
    assert (outcome, bool(reason)) == ("refused", True)
    await letters.drop(by_conversation["dropped"])
    assert (await patient.conversation("dropped").items()).complete
    assert not (await patient.conversation("retried").context()).complete
    with pytest.raises(NotFound):
        await letters.drop(by_conversation["dropped"])


async def test_retry_stores_the_item_at_its_own_position(
    patient: Buffer, postgres: asyncpg.Connection, redis: Redis
) -> None:
    """Once what was wrong is mended, the item takes the place in which it was acked."""
    conversation = patient.conversation("c")
    await conversation.append(GOOD, id="first")
    await _poison(patient, redis, "c", "second", b'{"n": 2')
    await conversation.append(GOOD, id="third")
    await patient.flush()
    letters = DeadLetters(patient.runtime.database)
    (letter,) = await letters.page()
    await postgres.execute("update buffer.dead_letters set payload = payload || '}'::bytea")
    assert await letters.retry(letter.id) == ("stored", "")
    page = await conversation.items()
    assert [item.id for item in page.items] == ["first", "second", "third"]
    assert (page.complete, dict(page.items[1])) == (True, {"n": 2})
    assert not await letters.page()


async def test_dlq_commands(patient: Buffer, redis: Redis, tmp_path: Path) -> None:
    """list, show, retry and drop: text and JSON, exit codes, and nothing dropped without --yes."""
    await _poison(patient, redis, "c", "poison", b'{"half')
    await patient.flush()
    settings = patient.settings
    listed = await run(settings, "dlq", "list", "--json", cwd=tmp_path)
    document = json.loads(listed.stdout)
    assert document["count"] == 1
    number = str(document["dead_letters"][0]["id"])
    assert "default/c/poison" in (await run(settings, "dlq", "list", cwd=tmp_path)).stdout
    assert '{"half' in (await run(settings, "dlq", "show", number, cwd=tmp_path)).stdout
    assert (await run(settings, "dlq", "retry", number, cwd=tmp_path)).returncode == 1
    assert (await run(settings, "dlq", "drop", number, cwd=tmp_path)).returncode == 2
    assert (await run(settings, "dlq", "retry", cwd=tmp_path)).returncode == 2
    dropped = await run(settings, "dlq", "drop", "--all", "--yes", "--json", cwd=tmp_path)
    assert json.loads(dropped.stdout) == [{"id": int(number), "outcome": "dropped", "reason": ""}]
    gone = await run(settings, "dlq", "show", number, cwd=tmp_path)
    assert (gone.returncode, "Traceback" in gone.stderr) == (1, False)
