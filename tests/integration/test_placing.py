"""Placing rows at positions that they have already: spilled, salvaged, appended directly."""

from __future__ import annotations

from collections.abc import AsyncIterator
from datetime import UTC, datetime

import asyncpg
import pytest

from buffer.model.position import pack
from buffer.model.record import DELETE
from buffer.settings import Settings
from buffer.store.dead_letters import DeadLetters, KeptLetter
from buffer.store.placing import Placed, last_positions, place, place_acked, set_aside
from buffer.store.pool import BadRows, Database, DuplicateRows

AT = datetime(2026, 3, 1, 12, tzinfo=UTC)


@pytest.fixture
async def database(settings: Settings) -> AsyncIterator[Database]:
    database = Database(settings, "test")
    await database.open()
    yield database
    await database.close()


def row(
    number: int,
    item_id: str | None = None,
    data: bytes | None = None,
    *,
    cut: int | None = None,
    user: str | None = None,
    conversation: str = "c",
) -> Placed:
    """The item at a number of epoch 1; ``cut`` is the number after which it replaces."""
    body = b'{"n":%d}' % number if data is None else data
    after = None if cut is None else pack(1, cut)
    return Placed("t", conversation, pack(1, number), item_id or f"m-{number}", AT, body, after, user)


async def acked(database: Database, *rows: Placed) -> int:
    """`place_acked` in a transaction of its own: how many were new."""
    async with database.transaction() as connection:
        return await place_acked(connection, rows)


async def stored(postgres: asyncpg.Connection) -> dict[int, str | None]:
    """Number to body; None where the item was removed."""
    rows = await postgres.fetch("select position, data from buffer.items order by position")
    return {r["position"] - pack(1, 0): r["data"] for r in rows}


async def letters(database: Database) -> list[KeptLetter]:
    return await DeadLetters(database).page()


# --- place


async def test_place_inserts_what_is_not_there_by_its_id(
    database: Database, postgres: asyncpg.Connection
) -> None:
    """At its own position, with its own time; what is there already is left alone, wherever it stands."""
    async with database.transaction() as connection:
        assert await place(connection, [row(5, "a", b'{"first":1}')]) == {("t", "c", "a")}
        new = await place(connection, [row(9, "a", b'{"second":2}'), row(7, "b"), row(7, conversation="d")])
    assert new == {("t", "c", "b"), ("t", "d", "m-7")}
    rows = await postgres.fetch("select * from buffer.items where conversation = 'c' order by position")
    assert [(r["item_id"], r["position"], r["created_at"]) for r in rows] == [
        ("a", pack(1, 5), AT),
        ("b", pack(1, 7), AT),
    ]
    assert rows[0]["data"] == '{"first":1}'


async def test_place_records_conversations_and_their_users(
    database: Database, postgres: asyncpg.Connection
) -> None:
    """The first user that is told counts; a conversation without one gains it later."""
    await acked(database, row(1, user=None), row(2, user="u1"), row(3, user="u2"))
    await acked(database, row(4, conversation="d"))
    await acked(database, row(5, conversation="d", user="u3"), row(6, user="u4"))
    rows = await postgres.fetch("select conversation, user_id, created_at from buffer.conversations")
    assert {(r["conversation"], r["user_id"]) for r in rows} == {("c", "u1"), ("d", "u3")}


@pytest.mark.parametrize(
    ("bad", "error"),
    [(row(2, data=b'{"a":'), BadRows), (row(1, "another"), DuplicateRows)],
    ids=["not JSON", "position taken"],
)
async def test_place_refuses_a_bad_row_with_all_others(
    database: Database, postgres: asyncpg.Connection, bad: Placed, error: type[Exception]
) -> None:
    """An append is whole or not at all."""
    await acked(database, row(1))
    with pytest.raises(error):
        async with database.transaction() as connection:
            await place(connection, [row(0), bad, row(3)])
    assert list(await stored(postgres)) == [1]


# --- place_acked


async def test_bad_row_becomes_a_dead_letter_and_its_neighbours_are_stored(
    database: Database, postgres: asyncpg.Connection
) -> None:
    """What was acked must not be lost: it is kept with its payload, position and reason."""
    bad = row(1, "poison", b'{"a":"\xed\xa0\x80"}')
    assert await acked(database, row(0), bad, row(2)) == 2
    assert list(await stored(postgres)) == [0, 2]
    (letter,) = await letters(database)
    assert (letter.item_id, letter.position, letter.payload) == ("poison", pack(1, 1), bad.data)
    assert letter.reason
    assert await acked(database, row(0), bad, row(2)) == 0, "brought once more"
    assert len(await letters(database)) == 1


async def test_row_whose_position_is_taken_becomes_a_dead_letter(
    database: Database, postgres: asyncpg.Connection
) -> None:
    """It can only be a fault of ours, and even then nothing is lost."""
    await acked(database, row(1))
    assert await acked(database, row(0), row(1, "other"), row(2)) == 2
    assert list(await stored(postgres)) == [0, 1, 2]
    assert [letter.item_id for letter in await letters(database)] == ["other"]


async def test_rows_that_are_brought_twice_are_stored_once(
    database: Database, postgres: asyncpg.Connection
) -> None:
    """By two processes, or by one that acked an item and showed it too."""
    assert await acked(database, row(0), row(1), row(1), row(0)) == 2
    assert await acked(database, row(1), row(2)) == 1
    assert list(await stored(postgres)) == [0, 1, 2]
    assert await letters(database) == []


async def test_id_with_another_body_becomes_a_dead_letter(
    database: Database, postgres: asyncpg.Connection
) -> None:
    """The id was used anew while its holder was missing; the one that is stored stays."""
    await acked(database, row(9, "a", b'{"n": 1, "m": 2}'))
    assert await acked(database, row(3, "a", b'{"n":2}'), row(4)) == 1
    (letter,) = await letters(database)
    assert (letter.item_id, letter.position, letter.payload) == ("a", pack(1, 3), b'{"n":2}')
    assert str(pack(1, 9)) in letter.reason
    assert list(await stored(postgres)) == [4, 9]


async def test_id_with_an_equal_body_elsewhere_is_dropped(
    database: Database, postgres: asyncpg.Connection
) -> None:
    """Equal as JSON: it is the same item, and stored once."""
    await acked(database, row(9, "a", b'{"n": 1, "m": 2}'))
    assert await acked(database, row(3, "a", b'{"m":2,"n":1}')) == 0
    assert await letters(database) == []
    assert list(await stored(postgres)) == [9]


# --- what is replaced


@pytest.mark.parametrize("order", ["as acked", "replaced last", "one call", "one call, reversed"])
async def test_spilled_item_that_was_replaced_ends_removed(
    database: Database, postgres: asyncpg.Connection, order: str
) -> None:
    """Whichever process brings its part first. The row keeps the id, and its neighbours are untouched."""
    before, replaced, after = [row(0), row(1)], [row(2), row(3)], [row(4, cut=1), row(5)]
    if order == "as acked":
        for rows in (before, replaced, after):
            await acked(database, *rows)
    elif order == "replaced last":
        for rows in (after, replaced, before):
            await acked(database, *rows)
    elif order == "one call":
        await acked(database, *before, *replaced, *after)
    else:
        await acked(database, *after, *reversed(replaced), *before)
    expected = {n: f'{{"n":{n}}}' for n in (0, 1, 4, 5)} | {2: None, 3: None}
    assert await stored(postgres) == expected
    assert await acked(database, *replaced) == 0
    assert await stored(postgres) == expected
    assert [letter.item_id for letter in await letters(database)] == []


async def test_what_comes_after_a_replacement_is_not_replaced(
    database: Database, postgres: asyncpg.Connection
) -> None:
    """Nor is another conversation, nor the item after which it begins."""
    await acked(database, row(5, cut=3))
    await acked(database, row(6), row(3), row(4), row(4, conversation="d"))
    rows = await postgres.fetch("select conversation, item_id from buffer.items where data is not null")
    assert {tuple(r) for r in rows} == {("c", "m-3"), ("c", "m-5"), ("c", "m-6"), ("d", "m-4")}


async def test_repeat_replaces_nothing(database: Database, postgres: asyncpg.Connection) -> None:
    """A replacement counts where it was stored first: what came after it stays."""
    await acked(database, row(1), row(2, "edit", b"{}", cut=0), row(3))
    assert await acked(database, row(4, "edit", b"{}", cut=0)) == 0
    assert await stored(postgres) == {1: None, 2: "{}", 3: '{"n":3}'}


# --- set_aside, last_positions


async def test_set_aside_keeps_what_is_not_stored_as_dead_letters(
    database: Database, postgres: asyncpg.Connection
) -> None:
    """With the reason; what is stored, here or with an equal body, is not kept. Nothing gets into items."""
    await acked(database, row(1), row(2, "a", b'{"n":2}'))
    async with database.transaction() as connection:
        kept = await set_aside(connection, [row(1), row(3), row(4, "a", b'{"n": 2}')], "written off")
    assert kept == 1
    (letter,) = await letters(database)
    assert (letter.item_id, letter.reason) == ("m-3", "written off")
    assert list(await stored(postgres)) == [1, 2]


async def test_last_positions_counts_removed_items(database: Database) -> None:
    """What removed the last item is the last position; a conversation without items has none."""
    await acked(database, row(1), row(9), row(7, conversation="d"))
    await acked(database, row(11)._replace(kind=DELETE, cut=pack(1, 9), data=b""))
    async with database.connection() as connection:
        found = await last_positions(connection, [("t", "c"), ("t", "d"), ("t", "none"), ("other", "c")])
    assert found == {("t", "c"): pack(1, 11), ("t", "d"): pack(1, 7)}
