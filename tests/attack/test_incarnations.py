"""A store that is another one than before, or an older one: noticed, counted, and nothing acked is lost."""

from __future__ import annotations

import asyncpg
import pytest
from redis.asyncio import Redis

from buffer import Buffer, Settings
from buffer.store.ledger import LossLedger
from tests.support.ledger import Ledger, in_postgres, in_reads
from tests.support.paths import on_path
from tests.support.polling import eventually

pytestmark = pytest.mark.attack


async def _append(buffer: Buffer, ledger: Ledger, count: int, *, conversations: int = 8) -> None:
    for number in range(count):
        for index in range(conversations):
            name = f"c{index}"
            body = {"name": name, "at": ledger.items, "n": number}
            ledger.ack(name, await buffer.conversation(name).append(body), body)


async def _incarnations(postgres: asyncpg.Connection, store: str) -> int:
    return int(await postgres.fetchval("select count(*) from buffer.incarnations where store = $1", store))


async def _delete_everything(redis: Redis, settings: Settings, buffer: Buffer) -> None:
    keys = [key async for key in redis.scan_iter(f"{settings.key_prefix}:*")]
    await redis.delete(*keys)


async def _trim(redis: Redis, settings: Settings, buffer: Buffer) -> None:
    for keys in buffer.runtime.shards.keys:
        await redis.xtrim(keys.stream, maxlen=3, approximate=False)


async def _cut_the_end(redis: Redis, settings: Settings, buffer: Buffer) -> None:
    for keys in buffer.runtime.shards.keys:
        entries = await redis.xrevrange(keys.stream, count=3)
        await redis.xdel(keys.stream, *(entry_id for entry_id, _ in entries))


async def _take_one_out(redis: Redis, settings: Settings, buffer: Buffer) -> None:
    for keys in buffer.runtime.shards.keys:
        entries = await redis.xrange(keys.stream, count=5)
        await redis.xdel(keys.stream, entries[-2][0])


@pytest.mark.parametrize("damage", [_delete_everything, _trim, _cut_the_end, _take_one_out])
async def test_what_redis_does_not_hold_any_more_comes_from_those_who_acked_it(
    settings: Settings, postgres: asyncpg.Connection, redis: Redis, damage: object
) -> None:
    """Keys deleted, a stream cut at either end or in the middle, nothing of it flushed: all is there."""
    patient = settings.model_copy(update={"flush_interval_seconds": 60.0})
    async with Buffer.connect(patient, flusher=True) as buffer, Buffer.connect(patient) as other:
        ledger = Ledger()
        await _append(buffer, ledger, 10)
        await _append(other, ledger, 10)
        await damage(redis, settings, buffer)  # type: ignore[operator]
        await buffer.runtime.shards.nudge(*range(settings.shards))
        await eventually(lambda: _incarnations(postgres, "redis"))
        await on_path(buffer, "stream")
        await on_path(other, "stream")
        await _append(other, ledger, 2)
        assert not ledger.faults(await in_reads(buffer, ledger.conversations))
        await buffer.flush()
        await eventually(lambda: _told(buffer, "buffer_incarnation_changes_total"))
        totals = await LossLedger(buffer.runtime.database).totals()
        assert (totals.lost_turns, totals.missing, totals.dead_letters) == (0, 0, 0)
        assert totals.spilled_turns > 0
    assert not ledger.faults(await in_postgres(postgres))


def _told(buffer: Buffer, metric: str) -> float:
    registry = buffer.runtime.metrics.registry
    return sum(s.value for m in registry.collect() for s in m.samples if s.name == metric)


async def test_redis_wiped_between_two_lives_of_the_service_is_counted(
    settings: Settings, postgres: asyncpg.Connection, redis: Redis
) -> None:
    """Noticed at start-up; positions go on in a new epoch, and nothing is taken for loss that was flushed."""
    ledger = Ledger()
    async with Buffer.connect(settings, flusher=True) as buffer:
        await _append(buffer, ledger, 5)
    await _delete_everything(redis, settings, buffer)
    async with Buffer.connect(settings, flusher=True) as buffer:
        await on_path(buffer, "stream")
        await _append(buffer, ledger, 5)
        assert not ledger.faults(await in_reads(buffer, ledger.conversations))
        assert await _incarnations(postgres, "redis") == 1
    assert await postgres.fetchval("select count(*) from buffer.losses") == 0
    assert not ledger.faults(await in_postgres(postgres))


async def test_postgres_that_forgot_a_flush_is_noticed_and_the_range_is_counted(
    settings: Settings, postgres: asyncpg.Connection
) -> None:
    """A standby was promoted without the last rows: what Redis had been told is committed is lost."""
    async with Buffer.connect(settings, flusher=True) as buffer:
        conversation = buffer.conversation("c")
        receipts = [await conversation.append({"n": n}) for n in range(10)]
        await buffer.flush()
        shard = conversation._target.shard
    await postgres.execute("delete from buffer.items where position > $1", receipts[5].position)
    await postgres.execute(
        "update buffer.shards set flushed_through = $2 where shard = $1", shard, receipts[5].position
    )
    async with Buffer.connect(settings, flusher=True) as buffer:
        await eventually(lambda: _incarnations(postgres, "postgres"))
        (loss,) = await LossLedger(buffer.runtime.database).losses()
        assert (loss.shard, loss.kind, loss.turns) == (shard, "postgres", 4)
        assert (loss.first_position, loss.last_position) == (receipts[6].position, receipts[9].position)
        after = await buffer.conversation("c").append({"n": 10}, durability="stored")
        assert after.position > receipts[9].position
        shown = [item["n"] for item in (await buffer.conversation("c").items()).items]
        assert shown == [0, 1, 2, 3, 4, 5, 10]
        await eventually(lambda: _told(buffer, "buffer_lost_turns_total") == 4)


async def test_postgres_of_an_older_epoch_goes_on_after_the_one_that_redis_knows(
    settings: Settings, postgres: asyncpg.Connection
) -> None:
    """Restored from an old backup: unflushed items are salvaged, positions stay final, it is counted."""
    patient = settings.model_copy(update={"flush_interval_seconds": 60.0, "write_off_seconds": 0.0})
    async with Buffer.connect(patient, flusher=True) as buffer:
        conversation = buffer.conversation("c")
        await conversation.append({"n": 0}, durability="stored")
        kept = await conversation.append({"n": 1})
        # The backup: one epoch ago, before anything was flushed, and with nobody of today registered.
        await postgres.execute(
            "update buffer.shards set path_epoch = 1, mode = 'direct', flushed_through = 0"
        )
        await postgres.execute("delete from buffer.items; delete from buffer.processes")
        await eventually(lambda: _incarnations(postgres, "postgres"))
        await on_path(buffer, "stream")
        after = await conversation.append({"n": 2}, durability="stored")
        assert after.position > kept.position
        shown = [item["n"] for item in (await conversation.items()).items]
        assert shown == [1, 2]
        assert await postgres.fetchval("select sum(turns) from buffer.losses where kind = 'postgres'") == 1
