"""Redis dies by SIGKILL while many append, and comes back with its append-only file."""

from __future__ import annotations

import asyncpg
import pytest

from buffer import Buffer, Settings
from buffer.embedded import EmbeddedServers
from tests.support.ledger import in_postgres, in_reads
from tests.support.load import under_load
from tests.support.polling import eventually

pytestmark = pytest.mark.attack


@pytest.mark.parametrize("flushing", [True, False], ids=["flushing", "unflushed"])
async def test_redis_killed_under_load_loses_and_doubles_nothing(
    own_servers: EmbeddedServers, own_settings: Settings, flushing: bool
) -> None:
    """Killed twice under load: every acked item is there once, in order, before and after the flush."""
    # With ``always`` what is acked is in the file; what ``everysec`` may lose is a matter of the disk.
    await own_servers.redis.stop()
    own_servers.redis.config["appendfsync"] = "always"
    await own_servers.redis.restart()
    interval = 0.1 if flushing else 30.0
    settings = own_settings.model_copy(
        update={"flush_interval_seconds": interval, "flush_max_turns": 1_000_000}
    )
    async with Buffer.connect(settings, flusher=True) as buffer:
        async with under_load(buffer, writers=32) as load:
            for _ in range(2):
                goal = load.acked + 1_500
                await eventually(lambda goal=goal: load.acked >= goal, seconds=30)
                assert load.per_second > 1_000 or load.unknown
                await own_servers.redis.kill()
                await eventually(lambda: load.refused + load.unknown)
                await own_servers.redis.restart()
            goal = load.acked + 500
            await eventually(lambda: load.acked >= goal, seconds=30)
        assert not load.ledger.faults(await in_reads(buffer, load.ledger.conversations))
        await buffer.flush()
        assert not load.ledger.faults(await in_reads(buffer, load.ledger.conversations))
        postgres = await asyncpg.connect(settings.postgres_url)
        assert not load.ledger.faults(await in_postgres(postgres))
        assert await postgres.fetchval("select count(*) from buffer.dead_letters") == 0
        await postgres.close()
