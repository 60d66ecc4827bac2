"""Views in a Redis that is nearly full: they make way for what is not flushed, and reads stay right."""

from __future__ import annotations

import asyncio
import os
import random

import pytest
from redis.asyncio import Redis

from buffer import Buffer
from buffer.app.runtime import migrate_database
from buffer.embedded import EmbeddedServers
from tests.conftest import REDIS_BINARY, settings_for
from tests.support.paths import on_path
from tests.support.polling import eventually

pytestmark = pytest.mark.attack

CONVERSATIONS = int(os.environ.get("BUFFER_TEST_VIEWS_CONVERSATIONS", "12000"))
WAVE = 250  # what waits for Postgres is little beside the views
BODY = {"x": "x" * 1_500}


async def _append_all(buffer: Buffer) -> None:
    """One item to each conversation; nothing but an ack will do."""
    for first in range(0, CONVERSATIONS, WAVE):
        numbers = range(first, min(first + WAVE, CONVERSATIONS))
        await asyncio.gather(
            *(buffer.conversation(f"c-{n}").append(BODY | {"n": n}, id=f"m-{n}") for n in numbers)
        )
        await buffer.flush()


async def _is_right(buffer: Buffer, number: int) -> None:
    context = await buffer.conversation(f"c-{number}").context()
    assert context.complete
    assert [(item.id, item["n"]) for item in context.items] == [(f"m-{number}", number)]


async def test_views_never_make_an_append_fail() -> None:
    """With noeviction: more views than fit are begun and filled; no append is refused, no read is wrong."""
    small = {"maxmemory": "20mb", "maxmemory-policy": "noeviction", "appendonly": "no"}
    async with EmbeddedServers.start(
        redis_binary=REDIS_BINARY, redis_config=small, postgres_config={"fsync": "off"}
    ) as servers:
        settings = settings_for(servers, idempotency_window_seconds=1.0)
        await migrate_database(settings)
        async with (
            Buffer.connect(settings, flusher=True) as buffer,
            Redis.from_url(settings.redis_url) as redis,
        ):
            await on_path(buffer, "stream")
            await _append_all(buffer)
            await buffer.flush()
            swept = buffer.runtime.metrics["swept_views_total"]
            for _ in range(20):
                await asyncio.gather(
                    *(_is_right(buffer, number) for number in random.sample(range(CONVERSATIONS), 100))
                )
            await eventually(lambda: not buffer.runtime.capacity.crowded)
            assert swept._value.get() > 1_000
            assert (await redis.info("memory"))["used_memory"] < 0.85 * (20 << 20)
            # Room is used again.
            await _is_right(buffer, 1)
            assert await redis.exists(*[k.view(2, b"default/c-1") for k in buffer.runtime.shards.keys])


async def test_a_redis_without_any_room_serves_cold_reads(own_servers: EmbeddedServers) -> None:
    """At maxmemory no view can be claimed or filled: Postgres answers; with room, appends go on."""
    settings = settings_for(own_servers)
    async with Buffer.connect(settings, flusher=True) as buffer, Redis.from_url(settings.redis_url) as redis:
        conversation = buffer.conversation("c")
        await conversation.extend([{"n": n} for n in range(30)])
        await buffer.flush()
        for key in await redis.keys("*:view:*"):
            await redis.delete(key)
        await redis.config_set("maxmemory", 1)
        for _ in range(3):
            assert [item["n"] for item in (await conversation.context()).items] == list(range(10, 30))
        await redis.config_set("maxmemory", 0)
        await conversation.append({"n": 30})
        assert [item["n"] for item in (await conversation.context(3)).items] == [28, 29, 30]
