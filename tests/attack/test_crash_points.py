"""A flusher that dies at the worst moments: another one goes on, and nothing is lost or doubled."""

from __future__ import annotations

import signal

import asyncpg
import pytest

from buffer import Buffer, Settings
from buffer.faults import POINTS
from tests.support.ledger import Ledger, in_postgres, in_reads
from tests.support.paths import on_path
from tests.support.polling import eventually
from tests.support.processes import Commands

pytestmark = pytest.mark.attack

CONVERSATIONS, BATCHES, BATCH = 8, 5, 100
ITEMS = CONVERSATIONS * BATCHES * BATCH  # more than one settle step in each shard


async def _append(buffer: Buffer, ledger: Ledger) -> None:
    for batch in range(BATCHES):
        for number in range(CONVERSATIONS):
            name = f"c{number}"
            bodies = [{"role": "user", "content": f"{name} {batch} {i}"} for i in range(BATCH)]
            receipts = await buffer.conversation(name).extend(bodies)
            for receipt, body in zip(receipts, bodies, strict=True):
                ledger.ack(name, receipt, body)


async def _in_redis(buffer: Buffer) -> int:
    return sum(b.turns for b in await buffer.runtime.shards.peek(range(buffer.settings.shards)))


@pytest.mark.parametrize("point", POINTS)
async def test_flusher_killed_at_crash_point_loses_and_doubles_nothing(
    settings: Settings, postgres: asyncpg.Connection, commands: Commands, point: str
) -> None:
    """SIGKILL at each named point; reads are whole at once, and the next flusher drains the rest."""
    # Nothing is due until somebody asks: so the whole backlog is one flush, and dies in it.
    patient = settings.model_copy(update={"flush_interval_seconds": 60.0})
    dying = commands.flusher(patient, crash_at=point)
    ledger = Ledger()
    async with Buffer.connect(patient) as client:
        await on_path(client, "stream")
        await _append(client, ledger)
        nudge = [client.runtime.shards.nudge(shard) for shard in range(settings.shards)]
        for call in nudge:
            await call
        assert await eventually(lambda: dying.exit_code) == -signal.SIGKILL, dying.text

        rows, entries = len((await in_postgres(postgres)).values()), await _in_redis(client)
        if point in {"flush.before_read", "flush.mid_copy"}:
            assert (rows, entries) == (0, ITEMS)
        else:
            assert rows
            assert entries == ITEMS if point == "flush.committed" else 0 < entries < ITEMS
        assert not ledger.faults(await in_reads(client, ledger.conversations))

        async with Buffer.connect(settings, flusher=True):
            await eventually(lambda: _drained(client))
        assert not ledger.faults(await in_reads(client, ledger.conversations))
    assert not ledger.faults(await in_postgres(postgres))
    assert await postgres.fetchval("select count(*) from buffer.dead_letters") == 0
    assert await postgres.fetchval("select sum(flushed_turns) from buffer.shards") == ITEMS


async def _drained(buffer: Buffer) -> bool:
    return await _in_redis(buffer) == 0
