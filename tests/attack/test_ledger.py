"""The ledger that the attacks trust can fail: planted faults in real rows are found."""

from __future__ import annotations

import asyncpg
import pytest

from buffer import Buffer
from tests.support.ledger import Ledger, in_postgres, in_reads
from tests.support.load import under_load

pytestmark = pytest.mark.attack

_COPY_OF_ITEM = """
insert into buffer.items
select tenant, conversation, position + (1::bigint << 50), 'copy', created_at, data
from buffer.items where conversation = $1 and item_id = $2
"""
_SWAP_BODIES = """
update buffer.items i set data = other.data from buffer.items other
where i.conversation = $1 and other.conversation = $1
  and (i.item_id, other.item_id) in (('m-2', 'm-3'), ('m-3', 'm-2'))
"""
_SWAP_IDS = """
update buffer.items i set item_id = case item_id when 'm-2' then 'm-3' else 'm-2' end,
    data = (select data from buffer.items o where o.conversation = $1 and o.item_id <> i.item_id
            and o.item_id in ('m-2', 'm-3'))
where conversation = $1 and item_id in ('m-2', 'm-3')
"""


async def _filled(buffer: Buffer) -> Ledger:
    ledger = Ledger()
    for number in range(1, 6):
        body = {"role": "user", "content": f"turn {number}"}
        ledger.ack("c", await buffer.conversation("c").append(body, id=f"m-{number}"), body)
    await buffer.flush()
    return ledger


async def test_ledger_finds_nothing_wrong_in_an_honest_run(
    buffer: Buffer, postgres: asyncpg.Connection
) -> None:
    """Without a fault there is no finding, in Postgres or in reads."""
    ledger = await _filled(buffer)
    assert not ledger.faults(await in_postgres(postgres))
    assert not ledger.faults(await in_reads(buffer, ledger.conversations))


async def test_ledger_catches_a_lost_item(buffer: Buffer, postgres: asyncpg.Connection) -> None:
    """A deleted row is a lost item, in Postgres and in reads."""
    ledger = await _filled(buffer)
    await postgres.execute("delete from buffer.items where conversation = 'c' and item_id = 'm-3'")
    assert ledger.faults(await in_postgres(postgres)).lost == [("c", "m-3")]
    assert ledger.faults(await in_reads(buffer, ["c"])).lost == [("c", "m-3")]


async def test_ledger_catches_a_doubled_item(buffer: Buffer, postgres: asyncpg.Connection) -> None:
    """The same body under a second id is a doubled and an unexpected item."""
    ledger = await _filled(buffer)
    await postgres.execute(_COPY_OF_ITEM, "c", "m-4")
    faults = ledger.faults(await in_postgres(postgres))
    assert faults.unexpected == [("c", "copy")]
    assert len(faults.doubled) == 1
    assert ledger.faults(await in_reads(buffer, ["c"])).doubled


async def test_ledger_catches_an_id_seen_twice(buffer: Buffer, postgres: asyncpg.Connection) -> None:
    """The same id twice in one answer is a doubled item."""
    ledger = await _filled(buffer)
    seen = dict(await in_postgres(postgres))
    seen["c"] = [*seen["c"], seen["c"][0]]
    assert ("c", "m-1") in ledger.faults(seen).doubled


async def test_ledger_catches_swapped_bodies(buffer: Buffer, postgres: asyncpg.Connection) -> None:
    """Two bodies under each other's ids are altered items."""
    ledger = await _filled(buffer)
    await postgres.execute(_SWAP_BODIES, "c")
    assert ledger.faults(await in_postgres(postgres)).altered == [("c", "m-2"), ("c", "m-3")]


async def test_ledger_catches_items_out_of_order(buffer: Buffer, postgres: asyncpg.Connection) -> None:
    """Two rows in each other's places are out of order."""
    ledger = await _filled(buffer)
    async with postgres.transaction():
        await postgres.execute("alter table buffer.items drop constraint items_identity")
        await postgres.execute(_SWAP_IDS, "c")
    assert ledger.faults(await in_postgres(postgres)).out_of_order == [("c", "m-3")]


async def test_ledger_catches_an_item_that_nobody_appended(
    buffer: Buffer, postgres: asyncpg.Connection
) -> None:
    """A row that no writer knows of is unexpected; one of unknown outcome is not."""
    ledger = await _filled(buffer)
    body = {"role": "user", "content": "unheard"}
    await buffer.conversation("c").append(body, id="m-6", durability="stored")
    assert ledger.faults(await in_postgres(postgres)).unexpected == [("c", "m-6")]
    ledger.unknown("c", "m-6", body)
    assert not ledger.faults(await in_postgres(postgres))


async def test_ledger_catches_one_lost_item_among_thousands(
    buffer: Buffer, postgres: asyncpg.Connection
) -> None:
    """The load that the attacks use is compared item by item."""
    async with under_load(buffer, writers=8) as load:
        while load.acked < 1_000:
            await buffer.flush()
    await buffer.flush()
    assert not load.ledger.faults(await in_postgres(postgres))
    await postgres.execute("delete from buffer.items where conversation = 'load-3' and item_id = 'm-17'")
    assert load.ledger.faults(await in_postgres(postgres)).lost == [("load-3", "m-17")]
