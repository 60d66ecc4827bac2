"""Replaying erasures: what a restore brought back is gone again, and nothing new is taken for it."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from datetime import UTC, datetime

import asyncpg
import pytest

from buffer import Buffer, Settings
from buffer.model.position import epoch_of, pack, sequence_of
from buffer.store.pool import Database
from buffer.transfer import ReplayReport, export_erasures, replay_erasures
from tests.support.paths import on_path
from tests.support.polling import eventually

AT = datetime(2026, 3, 1, 12, tzinfo=UTC)
_TABLES = ("items", "removals", "conversations", "summaries")


@pytest.fixture
async def database(settings: Settings) -> AsyncIterator[Database]:
    database = Database(settings, "test")
    await database.open()
    yield database
    await database.close()


async def exported(database: Database) -> list[bytes]:
    lines: list[bytes] = []
    await export_erasures(database, lines.append)
    return lines


async def replayed(database: Database, lines: list[bytes], settings: Settings) -> ReplayReport:
    return await replay_erasures(database, lines, settings.shards)


def line(through: int, conversation: str = "c") -> bytes:
    """One erased conversation."""
    value = {"tenant": "default", "conversation": conversation, "through": str(through)}
    return json.dumps({**value, "erased_at": AT.isoformat()}).encode()


async def names(buffer: Buffer, conversation: str = "c") -> list[str]:
    return [item.id for item in (await buffer.conversation(conversation).items()).items]


async def test_replay_erases_what_a_restore_brought_back(
    buffer: Buffer, settings: Settings, database: Database, postgres: asyncpg.Connection
) -> None:
    """Items, stubs, removals, conversations; what began anew stays, and a second replay does nothing."""
    for name in ("c", "d", "kept"):
        conversation = buffer.conversation(name, user="u1" if name != "kept" else "u2")
        await conversation.extend([{"secret": n} for n in range(4)], ids=[f"m-{n}" for n in range(4)])
        await conversation.delete_item("m-1")
        last = (await conversation.context()).items[-1].position
        await conversation.set_summary("secret", through=last)
    await buffer.flush()
    backup = {table: await postgres.fetch(f"select * from buffer.{table}") for table in _TABLES}
    receipts = await buffer.delete_user("u1")
    await buffer.conversation("d").append({"anew": 1}, id="m-0", durability="stored")
    lines = await exported(database)
    assert b"secret" not in b"".join(lines)
    assert len(lines) == len(receipts) + 1

    await postgres.execute("delete from buffer.tombstones; delete from buffer.user_tombstones")
    await postgres.execute("delete from buffer.items; delete from buffer.conversations")
    anew = await buffer.conversation("d").append({"anew": 2}, id="m-9", durability="stored")
    for table, rows in backup.items():
        await postgres.copy_records_to_table(table, schema_name="buffer", records=_new(table, rows))
    assert await names(buffer) == ["m-0", "m-2", "m-3"]

    report = await replayed(database, lines, settings)
    assert (report.conversations, report.users, report.new, report.items) == (2, 1, 3, 8)
    assert await names(buffer) == []
    assert await names(buffer, "d") == ["m-9"]
    assert await names(buffer, "kept") == ["m-0", "m-2", "m-3"]
    for table in ("items", "removals", "summaries"):
        assert not await postgres.fetch(f"select from buffer.{table} where conversation = 'c'")
    left = await postgres.fetch("select conversation from buffer.conversations order by 1")
    assert [row["conversation"] for row in left] == ["d", "kept"]
    assert sorted(await exported(database)) == sorted(lines)

    again = await replayed(database, lines, settings)
    assert (again.new, again.items) == (0, 0)
    assert anew.position in [i.position for i in (await buffer.conversation("d").items()).items]


def _new(table: str, rows: list[asyncpg.Record]) -> list[asyncpg.Record]:
    """What of a backup does not stand there now: ``kept`` was never touched, ``d`` has a row again."""
    if table == "conversations":
        return [r for r in rows if r["conversation"] != "d"]
    return [r for r in rows if table == "items" or (table == "summaries" and r["conversation"] != "kept")]


async def test_rows_that_came_back_without_their_tombstones_go_are_erased_too(
    buffer: Buffer, settings: Settings, database: Database, postgres: asyncpg.Connection
) -> None:
    """Only a table was restored, and the tombstone still stands."""
    conversation = buffer.conversation("c")
    await conversation.append({"n": 1}, durability="stored")
    rows = await postgres.fetch("select * from buffer.items")
    await conversation.delete()
    await postgres.copy_records_to_table("items", schema_name="buffer", records=rows)
    report = await replayed(database, await exported(database), settings)
    assert (report.new, report.items) == (0, 1)
    assert await names(buffer) == []


async def test_after_a_replay_a_flusher_makes_the_conversations_row_again(
    buffer: Buffer, settings: Settings, database: Database, postgres: asyncpg.Connection
) -> None:
    """It had remembered that the row is there; replayed while it is at work, which nobody should."""
    conversation = buffer.conversation("c")
    receipt = await conversation.append({"n": 1}, durability="stored")
    await replayed(database, [line(receipt.position)], settings)
    await conversation.append({"n": 2}, durability="stored")
    assert [row["conversation"] for row in await postgres.fetch("select * from buffer.conversations")] == [
        "c"
    ]
    assert [item["n"] for item in (await conversation.items()).items] == [2]

    async def in_context() -> bool:  # whose view a flusher drops
        return [item["n"] for item in (await conversation.context()).items] == [2]

    await eventually(in_context)


async def test_direct_appends_go_on_after_what_was_erased(settings: Settings, database: Database) -> None:
    """The restored database would give out the same numbers again, which the tombstone covers."""
    async with Buffer.connect(settings) as buffer:
        first = await buffer.conversation("c").append({"n": 1})
        await replayed(database, [line(pack(epoch_of(first.position), 50))], settings)
        receipt = await buffer.conversation("c").append({"n": 2})
        assert (epoch_of(receipt.position), sequence_of(receipt.position)) == (epoch_of(first.position), 51)
        assert [item["n"] for item in (await buffer.conversation("c").items()).items] == [2]


@pytest.mark.parametrize("before", ["direct", "stream"])
async def test_path_goes_on_after_the_epoch_of_what_was_erased(
    settings: Settings, database: Database, postgres: asyncpg.Connection, before: str
) -> None:
    """The database is from before several changes of the path; appends now do not count as erased."""
    hasty = settings.model_copy(
        update={"heartbeat_timeout_seconds": 1.5, "redis_lost_seconds": 0.5, "write_off_seconds": 0.5}
    )
    if before == "stream":
        async with Buffer.connect(hasty, flusher=True) as buffer:
            await buffer.conversation("c").append({"n": 0}, durability="stored")
    lines = [line(pack(7, 50), name) for name in ("c", "d", "e", "f", "g", "h")]  # of every shard
    await replayed(database, lines, settings)
    async with Buffer.connect(hasty, flusher=True) as buffer:
        await on_path(buffer, "stream")
        receipt = await buffer.conversation("c").append({"n": 1}, durability="stored")
        assert epoch_of(receipt.position) > 7
        late = await buffer.conversation("c").append({"n": 2})
        state = buffer.runtime.member.states[buffer.conversation("c")._target.shard]
        await buffer.runtime.member.lose(
            buffer.conversation("c")._target.shard, state.epoch, "the test says so"
        )
        await eventually(lambda: state.epoch > epoch_of(late.position))
        await buffer.flush()
        assert [item["n"] for item in (await buffer.conversation("c").items()).items] == [1, 2]
    assert await postgres.fetchval("select count(*) from buffer.incarnations where store = 'postgres'")
    assert await postgres.fetchval("select count(*) from buffer.dead_letters") == 0


async def test_lines_that_cannot_be_read_are_refused_and_the_rest_goes_on(
    buffer: Buffer, settings: Settings, database: Database
) -> None:
    """Each names its line."""
    receipt = await buffer.conversation("c").append({}, durability="stored")
    bad = [
        b"{",
        b"[]",
        b'{"tenant": "a/b", "conversation": "c", "through": "1", "erased_at": "2026-03-01"}',
        b'{"tenant": "default", "conversation": "c", "through": 1, "erased_at": "2026-03-01"}',
        line((1 << 63) - 1),
        b'{"tenant": "default", "conversation": "c", "through": "1", "erased_at": "today"}',
        b'{"tenant": "default", "user": "", "erased_at": "2026-03-01"}',
    ]
    problems: list[str] = []
    lines = [b"\n", *bad, line(receipt.position)]
    report = await replay_erasures(database, lines, settings.shards, on_problem=problems.append)
    assert (report.rejected, report.conversations, report.items) == (len(bad), 1, 1)
    assert [text.partition(":")[0] for text in problems] == [f"line {n}" for n in range(2, 2 + len(bad))]
    assert await names(buffer) == []
