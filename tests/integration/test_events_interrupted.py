"""Listeners while something gets in between, slow ones, and how they end."""

from __future__ import annotations

import asyncio
from contextlib import AsyncExitStack, aclosing

import asyncpg
import pytest
from redis.asyncio import Redis

from buffer import Buffer, Event, Settings, SlowListener
from buffer.embedded import EmbeddedServers
from buffer.stream import feed
from buffer.stream.feed import Feed
from buffer.stream.shards import RawEntry
from tests.support.listeners import Heard, all_live, listening, rest, same_shard
from tests.support.paths import on_path
from tests.support.polling import eventually

# --- what gets in between


async def test_listener_does_not_notice_flushes(settings: Settings) -> None:
    """Items are flushed and trimmed within milliseconds; each is heard once."""
    busy = settings.model_copy(update={"flush_interval_seconds": 0.005, "flush_max_turns": 3})
    async with Buffer.connect(busy, flusher=True) as buffer, listening(buffer.conversation("c")) as heard:
        for number in range(300):
            await buffer.conversation("c").append({"n": number})
        events = await heard.count(300)
        assert [event.item["n"] for event in events if event.item] == list(range(300))


async def test_what_was_trimmed_before_it_was_read_is_heard_all_the_same(
    patient: Buffer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The follower sees the hole, and every listener of the shard reads what it missed."""
    names = same_shard(patient, 3)
    read, slow = Feed.read, asyncio.Event()
    slow.set()

    async def late(self: Feed, epoch: int, after: int) -> list[RawEntry]:
        entries = await read(self, epoch, after)
        if not slow.is_set():
            await slow.wait()
            return []  # as if the reply had come so late that it was cut
        return entries

    async with AsyncExitStack() as stack:
        heard = [await stack.enter_async_context(listening(patient.conversation(name))) for name in names]
        await all_live(patient, 3)
        monkeypatch.setattr(Feed, "read", late)
        slow.clear()
        await patient.conversation(names[0]).append({}, id="first")
        for name in names:
            await patient.conversation(name).append({}, id="lost")
        await patient.flush()
        monkeypatch.setattr(Feed, "read", read)
        slow.set()
        for name in names:
            await patient.conversation(name).append({}, id="last")
        for one, expected in zip(
            heard, [["first", "lost", "last"], ["lost", "last"], ["lost", "last"]], strict=True
        ):
            await one.count(len(expected))
            assert one.ids == expected


async def test_listener_does_not_notice_a_lost_connection(patient: Buffer, redis: Redis) -> None:
    """Cut while it waits, again and again: nothing is missed, nothing comes twice."""
    conversation = patient.conversation("c")
    async with listening(conversation) as heard:
        for number in range(10):
            await all_live(patient, 1)
            await conversation.append({}, id=f"m-{number}")
            for client in await redis.client_list():
                if client["cmd"] == "xread":
                    await redis.client_kill_filter(_id=client["id"])
            await conversation.append({}, id=f"n-{number}")
        await heard.count(20)
        assert heard.ids == [name for n in range(10) for name in (f"m-{n}", f"n-{n}")]


async def test_listener_goes_with_the_path_from_postgres_to_redis_and_back(
    settings: Settings, postgres: asyncpg.Connection, redis: Redis
) -> None:
    """Direct until a flusher comes; then the grant is taken away, and given again."""
    async with Buffer.connect(settings) as buffer, listening(buffer.conversation("c")) as heard:
        conversation = buffer.conversation("c")
        await on_path(buffer, "direct")
        receipts = [await conversation.append({}, id=f"direct-{n}") for n in range(3)]
        async with Buffer.connect(settings, flusher=True):
            await on_path(buffer, "stream")
            receipts += [await conversation.append({}, id=f"stream-{n}") for n in range(3)]
            await redis.hdel(buffer.runtime.shards.keys[conversation._target.shard].shard, "epoch")
            for number in range(3):
                await conversation.append({}, id=f"again-{number}")
            await heard.count(9)
    assert [receipt.path for receipt in receipts] == ["direct"] * 3 + ["stream"] * 3
    assert heard.ids == [f"{path}-{n}" for path in ("direct", "stream", "again") for n in range(3)]


async def test_entry_of_a_newer_release_is_not_skipped(patient: Buffer, redis: Redis) -> None:
    """Nothing after it is told in its conversation; others go on."""
    names = same_shard(patient, 2)
    shard = patient.conversation(names[0])._target.shard
    async with (
        listening(patient.conversation(names[0])) as one,
        listening(patient.conversation(names[1])) as two,
    ):
        await all_live(patient, 2)
        (backlog,) = await patient.runtime.shards.peek([shard])
        keys = patient.runtime.shards.keys[shard]
        entry = await redis.xadd(keys.stream, {"h": "2/new/0", "d": "{}"}, id=f"{backlog.epoch}-*")
        await redis.hset(keys.shard, f"default/{names[0]}", entry.split(b"-")[1])
        for name in names:
            await patient.conversation(name).append({}, id="m-1")
        await two.count(1)
        assert one.events == []


async def test_listener_goes_to_postgres_while_redis_stands_still(
    own_servers: EmbeddedServers, own_settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its connection is there, and silent: the change of path is what tells it."""
    monkeypatch.setattr(feed, "_BLOCK_SECONDS", 60.0)
    quick = own_settings.model_copy(update={"redis_lost_seconds": 0.3})
    async with Buffer.connect(quick, flusher=True) as buffer:
        await on_path(buffer, "stream")
        conversation = buffer.conversation("c")
        async with listening(conversation) as heard:
            await conversation.append({}, id="m-1")
            await heard.count(1)
            await all_live(buffer, 1)
            own_servers.redis.pause()
            try:
                await conversation.append({}, id="m-2")
                await heard.count(2)
            finally:
                own_servers.redis.resume()
            await on_path(buffer, "stream")
            await conversation.append({}, id="m-3")
            await heard.count(3)


# --- slow listeners, and the end


async def test_slow_listener_is_told_so_and_resumes_without_a_gap(settings: Settings) -> None:
    """It gets what was kept for it, then the error; another listener of the same is not held up."""
    small = settings.model_copy(update={"events_buffer_max": 5})
    async with Buffer.connect(small, flusher=True) as buffer:
        await on_path(buffer, "stream")
        conversation = buffer.conversation("c")
        async with listening(conversation) as quick, aclosing(conversation.events(0)) as slow:
            receipts = [await conversation.append({"n": 0})]
            heard = [await anext(slow)]
            taking = asyncio.create_task(anext(slow))
            await all_live(buffer, 2)
            receipts.append(await conversation.append({"n": 1}))
            heard.append(await taking)  # from here on it takes nothing
            for number in range(2, 30):
                receipts.append(await conversation.append({"n": number}))
                await quick.count(number + 1)
            heard += [await anext(slow) for _ in range(5)]
            with pytest.raises(SlowListener, match="events_buffer_max") as caught:
                await anext(slow)
            assert caught.value.position == heard[-1].position == receipts[6].position
        heard += await rest(conversation, caught.value.position, receipts[-1].position)
        assert [event.position for event in heard] == [receipt.position for receipt in receipts]
        assert buffer.runtime.metrics["slow_listeners_total"]._value.get() == 1


async def test_listener_that_reads_old_history_slowly_is_not_told_to_be_slow(settings: Settings) -> None:
    """More than its buffer holds is appended while it is still far behind: it goes on at its own pace."""
    small = settings.model_copy(update={"events_buffer_max": 5, "flush_interval_seconds": 60.0})
    async with Buffer.connect(small, flusher=True) as buffer:
        await on_path(buffer, "stream")
        conversation = buffer.conversation("c")
        await conversation.extend([{}] * 250)
        await buffer.flush()
        async with aclosing(conversation.events(0)) as slow:
            heard = [await anext(slow)]
            last = (await conversation.extend([{}] * 50))[-1].position
            async with asyncio.timeout(10):
                while heard[-1].position < last:
                    heard.append(await anext(slow))
        assert len(heard) == 300


async def test_shard_is_followed_only_while_somebody_listens(patient: Buffer, redis: Redis) -> None:
    """By one connection for all; afterwards no task and no connection is left."""

    async def reading() -> set[str]:
        return {client["id"] for client in await redis.client_list() if client["cmd"] == "xread"}

    async def closed(ids: set[str]) -> bool:
        return not ids & {client["id"] for client in await redis.client_list()}

    def tasks() -> list[str]:
        return [task.get_name() for task in asyncio.all_tasks() if task.get_name().startswith("follow-")]

    for _ in range(3):
        async with AsyncExitStack() as stack:
            for name in same_shard(patient, 5):
                for _ in range(2):
                    await stack.enter_async_context(listening(patient.conversation(name)))
            await all_live(patient, 10)
            ids = await eventually(reading)
            assert len(ids) == 1
            assert tasks() == ["follow-0"]
            assert patient.runtime.metrics["event_listeners"]._value.get() == 10
        await eventually(lambda: not tasks())
        await eventually(lambda ids=ids: closed(ids))
        assert patient.runtime.events._followers == {}
        assert patient.runtime.metrics["event_listeners"]._value.get() == 0


async def test_listener_that_leaves_the_loop_is_forgotten(patient: Buffer) -> None:
    """Without being closed by hand."""
    conversation = patient.conversation("c")
    await conversation.append({}, id="m-1")

    async def first() -> Event:
        async for event in conversation.events(0):
            return event
        raise AssertionError

    assert (await first()).item_id == "m-1"
    await eventually(lambda: patient.runtime.events._followers == {})


@pytest.mark.parametrize("path", ["stream", "direct"])
async def test_listeners_end_with_the_buffer(settings: Settings, path: str) -> None:
    """Without an error, wherever they were."""
    heard = [Heard() for _ in range(5)]
    async with Buffer.connect(settings, flusher=path == "stream") as buffer:
        await on_path(buffer, path)
        conversation = buffer.conversation("c")
        await conversation.append({})
        tasks = [
            asyncio.create_task(one.run(conversation, None if n % 2 else 0)) for n, one in enumerate(heard)
        ]
        await heard[0].count(1)
    async with asyncio.timeout(5):
        await asyncio.gather(*tasks)
    assert all(one.ended and one.error is None for one in heard), [one.error for one in heard]
