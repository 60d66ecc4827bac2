"""Postgres is away for ten seconds while many append: nobody notices, and then everything drains."""

from __future__ import annotations

import asyncio
import time

import asyncpg
import pytest

from buffer import Buffer, PostgresUnavailable, Settings
from buffer.embedded import EmbeddedServers
from tests.support.ledger import Ledger, in_postgres, in_reads
from tests.support.load import under_load
from tests.support.polling import eventually

pytestmark = pytest.mark.attack

AWAY_SECONDS = 10.0

_WAITING_COPY = """
select pid from pg_stat_activity
where datname = current_database() and wait_event_type = 'Lock' and query like 'COPY %'
"""


@pytest.mark.parametrize("way", ["stopped", "killed"])
async def test_postgres_away_under_load_delays_no_append_and_loses_nothing(
    own_servers: EmbeddedServers, own_settings: Settings, way: str
) -> None:
    """Appends go on at their pace while Postgres is away; afterwards all drains, once and in order."""
    async with Buffer.connect(own_settings, flusher=True) as buffer:
        async with under_load(buffer, writers=16, pause_seconds=0.01) as load:
            await eventually(lambda: load.acked >= 500)
            await (own_servers.postgres.stop() if way == "stopped" else own_servers.postgres.kill())
            back_at = time.monotonic() + (AWAY_SECONDS if way == "stopped" else 1.0)
            while time.monotonic() < back_at:
                goal = load.acked + 100
                await eventually(lambda goal=goal: load.acked >= goal, seconds=2)
            with pytest.raises(PostgresUnavailable):  # an error, and not an empty conversation
                await buffer.conversation("load-0").items()
            await own_servers.postgres.restart()
        assert load.refused == load.unknown == 0
        await buffer.flush()
        backlog = await buffer.runtime.shards.peek(range(own_settings.shards))
        assert [shard.turns for shard in backlog] == [0] * own_settings.shards
        assert not load.ledger.faults(await in_reads(buffer, load.ledger.conversations))
    postgres = await asyncpg.connect(own_settings.postgres_url)
    assert not load.ledger.faults(await in_postgres(postgres))
    assert await postgres.fetchval("select count(*) from buffer.dead_letters") == 0
    await postgres.close()


@pytest.mark.parametrize("way", ["stuck", "cut"])
async def test_copy_that_cannot_go_on_is_given_up_and_done_again(
    settings: Settings, postgres: asyncpg.Connection, way: str
) -> None:
    """Stuck for longer than the time limit, or cut off while flow control holds it back: tried again."""
    limited = settings.model_copy(update={"flush_interval_seconds": 60.0, "postgres_timeout_seconds": 1.0})
    async with Buffer.connect(limited, flusher=True) as buffer:
        ledger = Ledger()
        # Postgres reads 1,000 rows before it meets the one that blocks; the rest fills the socket.
        for first in range(0, 3_000, 500):
            bodies = [{"n": first + i, "content": "x" * 800} for i in range(500)]
            ids = [f"m-{body['n']}" for body in bodies]
            receipts = await buffer.conversation("c").extend(bodies, ids=ids)
            for receipt, body in zip(receipts, bodies, strict=True):
                ledger.ack("c", receipt, body)
        failures = buffer.runtime.metrics["flush_failures_total"].labels(reason="postgres")
        blocker = await asyncpg.connect(limited.postgres_url)
        blocking = blocker.transaction()
        await blocking.start()
        await blocker.execute("insert into buffer.items values ('default', 'c', 1, 'm-0', now(), null)")
        flushing = asyncio.create_task(buffer.flush())
        await eventually(lambda: postgres.fetch(_WAITING_COPY))
        if way == "cut":
            await postgres.fetch(_WAITING_COPY.replace("pid from", "pg_terminate_backend(pid) from"))
        await eventually(failures._value.get, seconds=5)
        await blocking.rollback()
        await blocker.close()
        await flushing
    assert not ledger.faults(await in_postgres(postgres))
