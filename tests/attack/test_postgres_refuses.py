"""Postgres is there and refuses: read-only, or a table is missing. Nothing is dropped, and appends go on."""

from __future__ import annotations

import time

import asyncpg
import pytest

from buffer import Buffer, Settings
from tests.support.ledger import in_postgres, in_reads
from tests.support.load import under_load
from tests.support.paths import modes
from tests.support.polling import eventually

pytestmark = pytest.mark.attack

# Whoever is connected keeps its session's settings, so connections are ended.
_RECONNECT = """
select pg_terminate_backend(pid) from pg_stat_activity where datname = $1 and pid <> pg_backend_pid()
"""

BREAK = {
    "read-only": "alter database {name} set default_transaction_read_only = on",
    "table away": "alter table buffer.items rename to items_away",
}
MEND = {
    "read-only": "alter database {name} reset default_transaction_read_only",
    "table away": "alter table buffer.items_away rename to items",
}


@pytest.mark.parametrize("way", BREAK)
async def test_postgres_that_refuses_delays_no_append_and_dead_letters_nothing(
    settings: Settings, postgres: asyncpg.Connection, way: str
) -> None:
    """Longer than a heartbeat time-out: no process is judged dead, appends go on, and all drains later."""
    quick = settings.model_copy(update={"heartbeat_timeout_seconds": 1.5, "append_timeout_seconds": 2.0})
    name = settings.key_prefix
    async with Buffer.connect(quick, flusher=True) as buffer, Buffer.connect(quick) as other:
        async with under_load(buffer, writers=16, pause_seconds=0.01) as load:
            await eventually(lambda: load.acked >= 300)
            await postgres.execute(BREAK[way].format(name=name))
            await postgres.execute(_RECONNECT, name)
            failures = buffer.runtime.metrics["flush_failures_total"]
            away_until = time.monotonic() + 4
            while time.monotonic() < away_until:
                goal = load.acked + 200
                await eventually(lambda goal=goal: load.acked >= goal, seconds=2)
            await eventually(lambda: any(s.value for m in failures.collect() for s in m.samples))
            assert modes(buffer) == modes(other) == {"stream"}
            await postgres.execute(MEND[way].format(name=name))
            await postgres.execute(_RECONNECT, name)
        await buffer.flush()
        assert not load.ledger.faults(await in_reads(other, load.ledger.conversations))
    assert not load.ledger.faults(await in_postgres(postgres))
    assert await postgres.fetchval("select count(*) from buffer.dead_letters") == 0
    assert await postgres.fetchval("select count(*) from buffer.missing") == 0
