"""Erasures and deletions that meet something else halfway: nothing comes back, nothing else is taken."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from datetime import UTC, datetime
from pathlib import Path
from urllib.parse import unquote

import asyncpg
import pytest
from redis.asyncio import Redis

from buffer import Buffer, OutcomeUnknown, Settings, Unavailable
from buffer.model.position import pack
from buffer.model.record import DELETE, ERASE
from buffer.store import removals
from buffer.store.items import NewConversation, Row, add_conversations, copy_rows
from buffer.store.paths import lock
from buffer.store.placing import Placed, last_positions, place_acked, set_aside
from buffer.store.pool import Database
from buffer.store.removals import Erasure
from buffer.store.transfer import ImportedConversation, lock_conversations
from tests.support.paths import on_path
from tests.support.polling import eventually
from tests.support.proxy import Fault, proxied

AT = datetime(2026, 3, 1, 12, tzinfo=UTC)
_WAITING = "select from pg_stat_activity where datname = current_database() and wait_event_type = 'Lock'"


@pytest.fixture
async def database(settings: Settings) -> AsyncIterator[Database]:
    database = Database(settings, "test")
    await database.open()
    yield database
    await database.close()


def entry(number: int, kind: str = "i", item_id: str = "", *, cut: int | None = None) -> Placed:
    """The entry at a number of epoch 1 of conversation ``c``."""
    data = b'{"n":%d}' % number if kind == "i" else b""
    after = None if cut is None else pack(1, cut)
    return Placed("t", "c", pack(1, number), item_id or f"m-{number}", AT, data, after, "u1", kind)


async def bring(database: Database, *rows: Placed) -> int:
    """What a spill does with entries; how many were new."""
    async with database.transaction() as connection:
        await lock(connection, [0])
        return await place_acked(connection, rows)


async def erase(database: Database, through: int) -> None:
    """What a flush does with an erasure."""
    async with database.transaction() as connection:
        await lock(connection, [0])
        await removals.erase(connection, [Erasure("t", "c", pack(1, through))])


async def count(postgres: asyncpg.Connection, table: str) -> int:
    return int(await postgres.fetchval(f"select count(*) from buffer.{table}"))


async def test_pop_whose_answer_is_lost_takes_one_item_at_the_most(settings: Settings) -> None:
    """Done once more it would take the next item, and the first would be gone without having been seen."""
    directory = unquote(settings.postgres_url.partition("?host=")[2])
    async with proxied(Path(directory) / ".s.PGSQL.5432") as proxy, Buffer.connect(settings) as buffer:
        await buffer.conversation("c").extend([{"n": n} for n in range(4)], ids=[f"m-{n}" for n in range(4)])
        url = f"postgresql://postgres@127.0.0.1:{proxy.port}/{settings.key_prefix}?sslmode=disable"
        async with Buffer.connect(settings, postgres=url) as far:
            proxy.once(Fault.CUT_BEFORE_REPLY, b"COMMIT")
            with pytest.raises(OutcomeUnknown) as caught:
                await far.conversation("c").pop()
            assert proxy.struck.is_set()
            assert list(caught.value.ids) == ["m-3"]
            popped = await far.conversation("c").pop()
        assert popped is not None
        assert popped.id == "m-2"
        assert [item["n"] for item in (await buffer.conversation("c").items()).items] == [0, 1]


async def test_append_under_an_old_id_waits_for_the_erasure_before_it(
    settings: Settings, redis: Redis
) -> None:
    """Redis has forgotten the id and Postgres has it: acked at once, the append would pass for a repeat."""
    patient = settings.model_copy(update={"flush_interval_seconds": 60.0})
    async with Buffer.connect(settings) as buffer:
        conversation = buffer.conversation("c", user="u1")
        async with Buffer.connect(patient, flusher=True):
            await on_path(buffer, "stream")
            await conversation.append({"n": 1}, id="m-1", durability="stored")
            await conversation.append({"n": 2}, id="m-2", durability="stored")
        shard = buffer.runtime.shards.keys[conversation._target.shard]
        await redis.delete(shard.ids, shard.ids_old)  # the window has passed

        erasing = asyncio.create_task(conversation.delete())
        await eventually(lambda: _unflushed(buffer))

        async def append_and_read() -> list[str]:
            await conversation.append({"n": 1}, id="m-1")
            await conversation.append({"n": 9}, id="m-9")
            return [item.id for item in (await conversation.items()).items]

        reading = asyncio.create_task(append_and_read())
        await asyncio.wait({reading}, timeout=0.3)
        async with Buffer.connect(patient, flusher=True):
            assert await reading == ["m-1", "m-9"]
            assert (await erasing).through
            await buffer.flush()
            assert [item.id for item in (await conversation.items()).items] == ["m-1", "m-9"]


async def _unflushed(buffer: Buffer) -> int:
    return sum(b.turns for b in await buffer.runtime.shards.peek(range(buffer.settings.shards)))


# --- what is brought late


async def test_removal_from_before_an_erasure_leaves_nothing(
    database: Database, postgres: asyncpg.Connection
) -> None:
    """A spill brings it late: the conversation has no last position, and no id of it is kept."""
    await bring(database, entry(3))
    await erase(database, 6)
    await bring(database, entry(5, DELETE, "m-3", cut=3))
    assert await count(postgres, "removals") == 0
    async with database.connection() as connection:
        assert await last_positions(connection, [("t", "c")]) == {}


async def test_what_is_brought_twice_with_its_erasure_is_counted_once(database: Database) -> None:
    """Counted twice, it would hide numbers that are nowhere, when the missing are written off."""
    rows = [entry(4), entry(5), entry(6, ERASE, "c")]
    assert await bring(database, *rows) == 3
    assert await bring(database, *rows) == 0


async def test_erasure_that_is_brought_twice_erases_once(
    database: Database, postgres: asyncpg.Connection
) -> None:
    """A conversation that was made anew meanwhile, without items yet, stays."""
    await bring(database, entry(5), entry(6, ERASE, "c"))
    async with database.transaction() as connection:
        await add_conversations(connection, [NewConversation("t", "c", "u1", AT, AT)])
    await bring(database, entry(5), entry(6, ERASE, "c"))
    assert await count(postgres, "conversations") == 1
    assert await count(postgres, "items") == 0


@pytest.mark.parametrize("order", [(4, 6, 9), (9, 6, 4), (6, 9, 4), (4, 9, 6)])
async def test_whatever_order_a_spill_has_the_erased_is_gone_and_the_later_stays(
    database: Database, postgres: asyncpg.Connection, order: tuple[int, ...]
) -> None:
    """One process a part: the item before the erasure, the erasure, the item after it."""
    parts = {4: entry(4), 6: entry(6, ERASE, "c"), 9: entry(9)}
    for number in order:
        await bring(database, parts[number])
    await bring(database, *parts.values())
    assert [r["item_id"] for r in await postgres.fetch("select item_id from buffer.items")] == ["m-9"]
    assert await count(postgres, "dead_letters") == 0
    async with database.transaction() as connection:
        await lock(connection, [0])
        await set_aside(connection, list(parts.values()), "written off")
    assert await count(postgres, "dead_letters") == 0


@pytest.mark.parametrize("order", [(4, 6, 9), (9, 6, 4), (6, 9, 4), (4, 9, 6)])
async def test_one_call_of_a_spill_has_the_same_outcome_in_any_order(
    database: Database, postgres: asyncpg.Connection, order: tuple[int, ...]
) -> None:
    """What comes after the erasure may have the id of what it erases."""
    parts = {4: entry(4, item_id="m"), 6: entry(6, ERASE, "c"), 9: entry(9, item_id="m")}
    await bring(database, *(parts[number] for number in order))
    assert [r["position"] for r in await postgres.fetch("select position from buffer.items")] == [pack(1, 9)]
    assert await count(postgres, "dead_letters") == 0


# --- users


async def test_dead_letters_of_a_user_are_erased_with_the_user(
    settings: Settings, database: Database, postgres: asyncpg.Connection
) -> None:
    """Also of a conversation of which nothing but the letter is there."""
    async with Buffer.connect(settings) as buffer:
        async with database.transaction() as connection:
            await set_aside(connection, [entry(5)._replace(position=5)], "written off")
        assert await count(postgres, "dead_letters") == 1
        assert [erased.conversation for erased in await buffer.delete_user("u1", tenant="t")] == ["c"]
    assert await count(postgres, "dead_letters") == 0


async def test_user_is_not_erased_while_a_part_of_the_data_is_missing(
    settings: Settings, postgres: asyncpg.Connection
) -> None:
    """A process that is missing may bring a conversation of the user afterwards."""
    await postgres.execute("insert into buffer.missing (shard, process) values (2, 'gone')")
    async with Buffer.connect(settings) as buffer:
        await buffer.conversation("c", user="u1").append({})
        with pytest.raises(Unavailable, match="missing"):
            await buffer.delete_user("u1")
        await postgres.execute("delete from buffer.missing")
        await eventually(lambda: all(state.clean for state in buffer.runtime.member.states))
        assert len(await buffer.delete_user("u1")) == 1


# --- an import at the same moment


async def test_erasure_waits_for_an_import_that_makes_the_conversation(
    database: Database, postgres: asyncpg.Connection
) -> None:
    """The import's rows are not there yet when the erasure begins, and are gone when it ends."""
    wanted = [ImportedConversation("t", "c", "u1", None, AT, AT)]
    async with database.transaction() as importing:
        await lock_conversations(importing, wanted, pack(1, 0))
        await copy_rows(importing, [Row("t", "c", 7, "m-7", AT, "{}")])
        erasing = asyncio.create_task(erase(database, 6))
        await eventually(lambda: erasing.done() or _is_waiting(postgres))
    await erasing
    assert await count(postgres, "items") == 0
    assert await count(postgres, "conversations") == 0


async def _is_waiting(postgres: asyncpg.Connection) -> bool:
    return bool(await postgres.fetch(_WAITING))
