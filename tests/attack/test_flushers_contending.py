"""More than one flusher believes that a shard is its own: the fence lets one through."""

from __future__ import annotations

import asyncio
import random
import signal
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import asyncpg
import pytest

from buffer import Buffer, Settings
from tests.support.ledger import Ledger, in_postgres, in_reads
from tests.support.load import under_load
from tests.support.paths import on_path
from tests.support.polling import eventually
from tests.support.processes import Command, Commands

pytestmark = pytest.mark.attack

_TAKE_AWAY = "update buffer.shards set owner = null, lease_until = '-infinity' where shard = $1"
_STEAL = "update buffer.shards set owner = 'thief', fence = fence + 1, lease_until = 'infinity'"
_GIVE_BACK = "update buffer.shards set owner = null, lease_until = '-infinity' where owner = 'thief'"
_HOLDS = "select count(*) from buffer.shards where owner like '%-' || $1 || '-%' and lease_until > now()"
_BLOCKED = """
select pid from pg_stat_activity
where application_name like 'buffer:' || $1 and wait_event_type = 'Lock' and query like '%' || $2 || '%'
"""
_IN_TRANSACTION = """
select count(*) from pg_stat_activity
where application_name like 'buffer:%-' || $1 || '-%' and xact_start is not null
"""
# Where a flush can be made to wait: a row of the batch, and its fence.
COPY, FENCE = 'COPY "buffer"."items"', "flushed_through = batch.through"


async def test_flushers_that_take_shards_from_each_other_lose_and_double_nothing(
    settings: Settings, postgres: asyncpg.Connection
) -> None:
    """Shards change hands 80 times under load, in the middle of flushes."""
    hasty = settings.model_copy(update={"flush_interval_seconds": 0.02, "lease_seconds": 0.3})
    async with Buffer.connect(hasty, flusher=True) as one, Buffer.connect(hasty, flusher=True) as other:
        async with under_load(one, writers=16) as load:
            for turn in range(80):
                await postgres.execute(_TAKE_AWAY, turn % settings.shards)
                goal = load.acked + 50
                await eventually(lambda goal=goal: load.acked >= goal)
        await one.flush()
        assert not load.ledger.faults(await in_reads(other, load.ledger.conversations))
        fences = await postgres.fetchval("select sum(fence) from buffer.shards")
        assert fences > 2 * settings.shards, "no shard ever changed hands"
    await _assert_stored_once(postgres, load.ledger)


async def test_flush_of_a_former_owner_is_fenced(settings: Settings, postgres: asyncpg.Connection) -> None:
    """A transaction that began before the shard got another owner commits nothing, and is counted."""
    patient = settings.model_copy(update={"flush_interval_seconds": 60.0})
    async with Buffer.connect(patient, flusher=True) as buffer:
        ledger = Ledger()
        await _append(buffer, ledger, 0)
        async with _blocking(settings, ledger, COPY):
            flushing = asyncio.create_task(buffer.flush())
            await eventually(lambda: postgres.fetch(_BLOCKED, "%", COPY))
            await postgres.execute(_STEAL)
        fenced = buffer.runtime.metrics["fenced_flushes_total"]
        await eventually(lambda: fenced._value.get() == 1)
        assert not await in_postgres(postgres)
        assert not ledger.faults(await in_reads(buffer, ledger.conversations))
        await postgres.execute(_GIVE_BACK)
        await flushing
        assert not ledger.faults(await in_reads(buffer, ledger.conversations))
    await _assert_stored_once(postgres, ledger)


@pytest.mark.parametrize("where", [COPY, FENCE], ids=["in COPY", "at the fence"])
async def test_flusher_stopped_past_its_lease_and_woken_changes_nothing(
    settings: Settings, postgres: asyncpg.Connection, commands: Commands, where: str
) -> None:
    """SIGSTOP in a transaction that holds locks, take-over by another flusher, SIGCONT: it fails."""
    patient = settings.model_copy(update={"flush_interval_seconds": 60.0})
    victim = commands.flusher(patient)
    ledger = Ledger()
    async with Buffer.connect(patient) as client:
        await eventually(lambda: _holds(postgres, victim))
        await on_path(client, "stream")
        await _append(client, ledger, 0)
        async with _blocking(settings, ledger, where):

            async def blocked() -> list[asyncpg.Record]:
                await client.runtime.shards.nudge(*range(settings.shards))  # it may not listen yet
                return await postgres.fetch(_BLOCKED, f"%-{victim.pid}-%", where)

            await eventually(blocked)
            victim.send(signal.SIGSTOP)
        assert await postgres.fetchval(_IN_TRANSACTION, str(victim.pid)), "stopped outside of a transaction"
        await _take_over_and_wake(settings, client, ledger, victim)
        await eventually(lambda: "flush failed" in victim.text or "was refused" in victim.text)
    await _assert_stored_once(postgres, ledger)


async def test_flusher_stopped_anywhere_and_woken_changes_nothing(
    settings: Settings, postgres: asyncpg.Connection, commands: Commands
) -> None:
    """The same at random moments of a big flush: fetch, COPY, commit, settle."""
    patient = settings.model_copy(update={"flush_interval_seconds": 60.0})
    victim = commands.flusher(patient)
    ledger = Ledger()
    async with Buffer.connect(patient) as client:
        await on_path(client, "stream")
        for number in range(3):
            await eventually(lambda: _holds(postgres, victim))
            await _append(client, ledger, number)
            await client.runtime.shards.nudge(*range(settings.shards))
            await asyncio.sleep(random.uniform(0, 0.15))  # the random moment
            victim.send(signal.SIGSTOP)
            await _take_over_and_wake(settings, client, ledger, victim)
            assert not ledger.faults(await in_reads(client, ledger.conversations))
    await _assert_stored_once(postgres, ledger)


async def _take_over_and_wake(settings: Settings, client: Buffer, ledger: Ledger, victim: Command) -> None:
    async with Buffer.connect(settings, flusher=True) as successor:
        await client.flush()
        assert not ledger.faults(await in_reads(successor, ledger.conversations))
        victim.send(signal.SIGCONT)
        await _append(client, ledger, 1_000 + ledger.items)
        await client.flush()
    assert victim.exit_code is None, victim.text


@asynccontextmanager
async def _blocking(settings: Settings, ledger: Ledger, where: str) -> AsyncIterator[None]:
    """Make a flush of what the ledger holds wait in Postgres, inside its transaction, until left."""
    connection = await asyncpg.connect(settings.postgres_url)
    transaction = connection.transaction()
    await transaction.start()
    try:
        if where == COPY:
            name = ledger.conversations[0]
            await connection.execute(
                "insert into buffer.items values ('default', $1, 1, $2, now(), null)",
                name,
                ledger.last_id(name),
            )
        else:
            await connection.execute("select from buffer.shards for update")
        yield
    finally:
        await transaction.rollback()
        await connection.close()


async def _append(buffer: Buffer, ledger: Ledger, batch: int) -> None:
    for number in range(8):
        name = f"c{number}"
        bodies = [{"role": "user", "content": f"{name} {batch} {i} " + "x" * 400} for i in range(200)]
        receipts = await buffer.conversation(name).extend(bodies)
        for receipt, body in zip(receipts, bodies, strict=True):
            ledger.ack(name, receipt, body)


async def _holds(postgres: asyncpg.Connection, flusher: Command) -> bool:
    return bool(await postgres.fetchval(_HOLDS, str(flusher.pid)))


async def _assert_stored_once(postgres: asyncpg.Connection, ledger: Ledger) -> None:
    assert not ledger.faults(await in_postgres(postgres))
    assert await postgres.fetchval("select count(*) from buffer.dead_letters") == 0
    assert await postgres.fetchval("select sum(flushed_turns) from buffer.shards") == ledger.items
