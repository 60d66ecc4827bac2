"""Level `replicated`: real replicas, and what receipts say when they are there, away, or come late."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from urllib.parse import urlsplit

import pytest
from redis.asyncio import Redis

from buffer import Buffer, Conflict, OutcomeUnknown, Settings
from buffer.app.runtime import migrate_database
from buffer.embedded import EmbeddedServers, RedisServer
from tests.conftest import REDIS_BINARY, settings_for
from tests.support.polling import eventually


@pytest.fixture
async def pair() -> AsyncIterator[tuple[Settings, RedisServer]]:
    """Settings of a primary, and the server that is to be its replica."""
    fast = {"repl-diskless-sync-delay": "0"}
    async with (
        EmbeddedServers.start(redis_binary=REDIS_BINARY, redis_config=fast, tcp=True) as servers,
        EmbeddedServers.start(redis_binary=REDIS_BINARY, tcp=True) as others,
    ):
        settings = settings_for(servers)
        await migrate_database(settings)
        yield settings, others.redis


async def _follow(replica: RedisServer, settings: Settings) -> None:
    primary = urlsplit(settings.redis_url)
    async with Redis.from_url(replica.url) as client:
        await client.execute_command("REPLICAOF", primary.hostname, primary.port)
        await eventually(lambda: _in_step(client))


async def _in_step(client: Redis) -> bool:
    return (await client.info("replication"))["master_link_status"] == "up"


async def test_replicated_is_claimed_only_when_a_replica_has_it(pair: tuple[Settings, RedisServer]) -> None:
    """Without one: unknown, and buffered. With one: the repeat is acked, and the replica holds the entry."""
    settings, replica = pair
    patient = settings.model_copy(update={"flush_interval_seconds": 60.0})
    async with Buffer.connect(patient, flusher=True) as buffer:
        conversation = buffer.conversation("c")
        with pytest.raises(OutcomeUnknown, match="replicas") as caught:
            await conversation.append({"n": 1}, id="m-1", durability="replicated", timeout=0.5)
        assert (caught.value.ids, caught.value.level) == (["m-1"], "buffered")

        await _follow(replica, settings)
        again = await conversation.append({"n": 1}, id="m-1", durability="replicated")
        assert (again.level, again.duplicate) == ("replicated", True)
        batch = await conversation.extend([{"n": n} for n in range(2, 5)], durability="replicated")
        assert [receipt.level for receipt in batch] == ["replicated"] * 3
        async with Redis.from_url(replica.url) as client:
            assert await client.xlen(buffer.runtime.shards.keys[conversation._target.shard].stream) == 4
        with pytest.raises(Conflict):
            await conversation.append({"n": 9}, id="m-1", durability="replicated")


async def test_replica_that_stands_still_leaves_the_outcome_unknown(
    pair: tuple[Settings, RedisServer],
) -> None:
    """Repeats, too, which write nothing; other levels are not held up; and it is acked once it goes on."""
    settings, replica = pair
    async with Buffer.connect(settings, flusher=True) as buffer:
        await _follow(replica, settings)
        conversation = buffer.conversation("c")
        await conversation.append({"n": 0}, id="m-0", durability="replicated")
        replica.pause()
        try:
            for _ in range(2):
                with pytest.raises(OutcomeUnknown) as caught:
                    await conversation.append({"n": 1}, id="m-1", durability="replicated", timeout=0.5)
                assert caught.value.level == "buffered"
            waiting = asyncio.create_task(conversation.append({"n": 2}, durability="replicated"))
            assert (await conversation.append({"n": 3}, timeout=0.5)).level == "buffered"
            assert not waiting.done()
        finally:
            replica.resume()
        assert (await waiting).level == "replicated"
        assert sorted(item["n"] for item in (await conversation.items()).items) == [0, 1, 2, 3]
