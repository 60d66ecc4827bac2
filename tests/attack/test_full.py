"""No room: Redis reaches its maxmemory, or a high-water mark, while Postgres is away."""

from __future__ import annotations

import asyncio
import math
import time

import asyncpg
import pytest
from redis.asyncio import Redis

from buffer import Buffer, Overloaded, Settings, Unavailable
from buffer.app.runtime import migrate_database
from buffer.embedded import EmbeddedServers
from tests.conftest import REDIS_BINARY, settings_for
from tests.support.ledger import Ledger, in_postgres, in_reads
from tests.support.paths import modes, on_path
from tests.support.polling import eventually

pytestmark = pytest.mark.attack

_MARKS = {
    "maxmemory": {"high_water_memory_share": 1.0},  # Redis itself refuses
    "share of maxmemory": {"high_water_memory_share": 0.2},
    "unflushed bytes": {"high_water_bytes": 2 << 20},
    "retained bytes": {"retained_max_bytes": 2 << 20},
}
_NAMED = {
    "maxmemory": "maxmemory",
    "share of maxmemory": "high_water_memory_share",
    "unflushed bytes": "high_water_bytes",
    "retained bytes": "retained_max_bytes",
}


async def _fill(buffer: Buffer, ledger: Ledger, writer: int) -> Overloaded:
    """Append until it is refused; the refusal."""
    conversation = buffer.conversation(f"c{writer}")
    number = 0
    while True:
        number += 1
        body = {"n": number, "x": "x" * 4_000}
        try:
            receipt = await conversation.append(body, id=f"m-{number}")
        except Overloaded as refusal:
            return refusal
        ledger.ack(conversation.id, receipt, body)


@pytest.mark.parametrize("mark", _MARKS)
async def test_what_does_not_fit_is_refused_and_what_was_acked_is_kept(mark: str) -> None:
    """With Postgres stopped: an error that names the limit and says when; later all drains."""
    # Marks in Redis are looked at four times a second: so much room behind them that they are not missed.
    small = {"maxmemory": "16mb" if mark == "maxmemory" else "256mb"}
    async with EmbeddedServers.start(redis_binary=REDIS_BINARY, redis_config=small) as servers:
        settings = settings_for(servers, **_MARKS[mark])
        await migrate_database(settings)
        ledger = Ledger()
        async with Buffer.connect(settings, flusher=True) as buffer:
            await servers.postgres.stop()
            refusals = await asyncio.gather(*(_fill(buffer, ledger, writer) for writer in range(8)))
            assert _NAMED[mark] in str(refusals[0])
            assert all(0 < refusal.retry_after <= 60 for refusal in refusals)
            assert ledger.items > 100
            if mark == "unflushed bytes":
                await eventually(lambda: buffer.runtime.metrics["seconds_to_full"]._value.get() == 0)
            assert modes(buffer) == {"stream"}, "a full Redis is not a lost one"
            await servers.postgres.restart()
            await _taken_again(buffer, ledger, settings)
            await buffer.flush()
            assert not ledger.faults(await in_reads(buffer, ledger.conversations))
            await eventually(
                lambda: buffer.runtime.metrics["seconds_to_full"]._value.get() == math.inf, seconds=30
            )
        await _assert_stored(settings, ledger)


async def _taken_again(buffer: Buffer, ledger: Ledger, settings: Settings) -> None:
    body = {"n": "again"}
    deadline = time.monotonic() + 20
    while True:
        try:
            receipt = await buffer.conversation("again").append(body, id="again")
        except Unavailable:
            assert time.monotonic() < deadline
            await asyncio.sleep(0.05)
        else:
            ledger.ack("again", receipt, body)
            return


async def test_fresh_flusher_drains_a_redis_that_is_full() -> None:
    """At maxmemory, with nobody alive who knew it before: takeover, flush and settle need no memory."""
    small = {"maxmemory": "16mb"}
    async with EmbeddedServers.start(redis_binary=REDIS_BINARY, redis_config=small) as servers:
        settings = settings_for(servers, high_water_memory_share=1.0)
        await migrate_database(settings)
        ledger = Ledger()
        async with Buffer.connect(settings, flusher=True):
            pass
        async with Buffer.connect(settings) as buffer:
            await on_path(buffer, "stream")
            await asyncio.gather(*(_fill(buffer, ledger, writer) for writer in range(8)))
            async with Buffer.connect(settings, flusher=True) as successor:
                await successor.flush()
                assert not ledger.faults(await in_reads(successor, ledger.conversations))
        await _assert_stored(settings, ledger)


async def _assert_stored(settings: Settings, ledger: Ledger) -> None:
    postgres = await asyncpg.connect(settings.postgres_url)
    try:
        assert not ledger.faults(await in_postgres(postgres))
        assert await postgres.fetchval("select count(*) from buffer.dead_letters") == 0
        assert await postgres.fetchval("select count(*) from buffer.losses") == 0
    finally:
        await postgres.close()


async def test_redis_that_takes_no_writes_is_lost_and_comes_back(
    own_servers: EmbeddedServers, own_settings: Settings
) -> None:
    """NOREPLICAS, as of a primary that is alone: appends go to Postgres, and back when it takes them."""
    settings = own_settings.model_copy(update={"redis_lost_seconds": 0.3})
    ledger = Ledger()
    async with (
        Redis.from_url(settings.redis_url) as admin,
        Buffer.connect(settings, flusher=True) as buffer,
    ):
        conversation = buffer.conversation("c")
        for replicas, path in (("0", "stream"), ("1", "direct"), ("0", "stream")):
            await admin.config_set("min-replicas-to-write", replicas)
            await on_path(buffer, path)
            for number in range(3):
                body = {"path": path, "n": number, "at": ledger.items}
                receipt = await conversation.append(body)
                assert receipt.path == path
                ledger.ack("c", receipt, body)
        assert not ledger.faults(await in_reads(buffer, ["c"]))
        await buffer.flush()
    await _assert_stored(settings, ledger)
