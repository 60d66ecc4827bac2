"""Postgres is away for ten seconds while many append: nobody notices, and then everything drains."""

from __future__ import annotations

import time

import asyncpg
import pytest

from buffer import Buffer, PostgresUnavailable, Settings
from buffer.embedded import EmbeddedServers
from tests.support.ledger import in_postgres, in_reads
from tests.support.load import under_load
from tests.support.polling import eventually

pytestmark = pytest.mark.attack

AWAY_SECONDS = 10.0


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
