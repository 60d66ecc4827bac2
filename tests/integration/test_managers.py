"""Path managers: who waits for their word, what they take for a loss, and what they survive."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress

import asyncpg
import pytest
from redis.asyncio import Redis

from buffer import Buffer, Settings
from buffer.embedded import EmbeddedServers
from buffer.flush.flusher import Flusher
from tests.support.paths import on_path
from tests.support.polling import eventually


@pytest.fixture
async def accepting(settings: Settings) -> AsyncIterator[Buffer]:
    """A buffer without a flusher, quick to notice who is silent."""
    quick = settings.model_copy(update={"heartbeat_timeout_seconds": 1.0})
    async with Buffer.connect(quick) as buffer:
        yield buffer


async def _managers(buffer: Buffer, redis: Redis) -> set[str]:
    """The managers for whose word the processes wait."""
    fields = await redis.hkeys(buffer.runtime.shards.keys[0].managers)
    return {field.decode() for field in fields if field}


async def test_manager_that_leaves_is_not_waited_for_any_more(accepting: Buffer, redis: Redis) -> None:
    """Else processes could ack nothing in the next outage of Postgres: it never says that it is out, too."""
    async with accepting.runtime.flushing() as first:
        await on_path(accepting, "stream")
        assert await _managers(accepting, redis) == {first.id}
        async with Buffer.connect(accepting.settings, flusher=True) as other:
            second = other.runtime.flusher_id
            await eventually(lambda: _knows(accepting, redis, {first.id, second}))
        assert await _managers(accepting, redis) == {first.id}


async def _knows(buffer: Buffer, redis: Redis, names: set[str]) -> bool:
    return await _managers(buffer, redis) == names


async def test_process_is_put_out_while_another_shard_is_closing(
    accepting: Buffer, postgres: asyncpg.Connection
) -> None:
    """Shards may be in different modes: the manager goes on, and each comes to its end."""
    member = accepting.runtime.member
    async with accepting.runtime.flushing():
        await on_path(accepting, "stream")
        epoch = member.states[0].epoch
        # One is alive, and does not confirm: shard 3 stays closing. The other one is dead.
        insert = "insert into buffer.processes (process, confirmed) values ($1, $2)"
        await postgres.execute(insert, "slow", [epoch] * 4)
        await postgres.execute(insert, "dead", [epoch, epoch, epoch, None])
        async with _beating(accepting, "slow"):
            await accepting.runtime.paths.close("test", {3: epoch}, "a test", unless_seen_seconds=None)
            await eventually(lambda: _is_gone(postgres, "dead"))
            modes = await postgres.fetch("select mode from buffer.shards order by shard")
            assert [row["mode"] for row in modes] == ["stream", "stream", "stream", "closing"]
        await postgres.execute("delete from buffer.processes where process = 'slow'")
        await on_path(accepting, "stream")
        assert member.states[3].epoch > epoch


@asynccontextmanager
async def _beating(buffer: Buffer, process: str) -> AsyncIterator[None]:
    """That process says that it lives, and nothing else."""

    async def beat() -> None:
        while True:
            await buffer.runtime.paths.heartbeat(process, 1.0)
            await asyncio.sleep(0.1)

    beating = asyncio.create_task(beat())
    try:
        yield
    finally:
        beating.cancel()
        with suppress(asyncio.CancelledError):
            await beating


async def _is_gone(postgres: asyncpg.Connection, process: str) -> bool:
    return not await postgres.fetch("select from buffer.processes where process = $1", process)


async def test_flusher_that_is_behind_another_one_takes_nothing_for_lost(
    accepting: Buffer, postgres: asyncpg.Connection
) -> None:
    """It stood still while its successor flushed and trimmed: what is gone from Redis is in Postgres."""
    conversation = accepting.conversation("c")
    async with accepting.runtime.flushing() as flusher:
        await on_path(accepting, "stream")
        epoch = accepting.runtime.member.states[conversation._target.shard].epoch
        for number in range(4):
            await conversation.append({"n": number}, durability="stored")
        _stand_where_it_began(flusher)
        for number in range(4, 8):
            await conversation.append({"n": number}, durability="stored")
            _stand_where_it_began(flusher)
        assert accepting.runtime.member.states[conversation._target.shard].epoch == epoch
    assert await postgres.fetch("select * from buffer.incarnations") == []
    assert await postgres.fetchval("select count(*) from buffer.items") == 8


def _stand_where_it_began(flusher: Flusher) -> None:
    for cursor in flusher._holdings.cursors.values():
        cursor.fetched = cursor.committed = -1


async def test_hole_in_a_stream_closes_its_path_and_is_filled_from_what_is_retained(
    accepting: Buffer, postgres: asyncpg.Connection, redis: Redis
) -> None:
    """Somebody took entries out of Redis that were not flushed; their process still has them."""
    conversation = accepting.conversation("c")
    shard = conversation._target.shard
    async with accepting.runtime.flushing():
        await on_path(accepting, "stream")
        epoch = accepting.runtime.member.states[shard].epoch
        await conversation.append({"n": 0}, durability="stored")
    receipts = [await conversation.append({"n": n}) for n in range(1, 5)]
    keys = accepting.runtime.shards.keys[shard]
    assert await redis.xdel(keys.stream, f"{epoch}-2", f"{epoch}-3") == 2
    async with accepting.runtime.flushing():
        await eventually(lambda: accepting.runtime.member.states[shard].epoch > epoch)
        await on_path(accepting, "stream")
        items = (await conversation.items()).items
        assert [item["n"] for item in items] == list(range(5))
        assert [item.position for item in items[1:]] == [r.position for r in receipts]
    (change,) = await postgres.fetch("select store, detail from buffer.incarnations")
    assert change["store"] == "redis"
    assert "2 entries" in change["detail"]


async def test_redis_that_answers_not_now_is_lost_like_one_that_does_not_answer(
    own_servers: EmbeddedServers, own_settings: Settings
) -> None:
    """It became a replica that waits for its primary: it talks, and serves nobody."""
    quick = own_settings.model_copy(update={"redis_lost_seconds": 0.3})
    async with (
        Buffer.connect(quick, flusher=True) as buffer,
        Redis.from_url(quick.redis_url, protocol=2) as redis,
    ):
        conversation = buffer.conversation("c")
        await conversation.append({"n": 1})
        await redis.config_set("replica-serve-stale-data", "no")
        await redis.execute_command("REPLICAOF", "127.0.0.1", "1")
        assert (await conversation.append({"n": 2})).path == "direct"
        await redis.execute_command("REPLICAOF", "NO", "ONE")
        await on_path(buffer, "stream")
        assert [item["n"] for item in (await conversation.items()).items] == [1, 2]
