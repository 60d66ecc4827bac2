"""The queue in front of Redis when the path, the connection and readers come in between."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import asyncpg
import pytest

from buffer import Buffer, OutcomeUnknown, Settings
from buffer.app.conversation import Conversation
from tests.support.paths import modes, on_path
from tests.support.polling import eventually
from tests.support.proxy import Proxy, proxied


@pytest.fixture
async def proxy(settings: Settings) -> AsyncIterator[Proxy]:
    async with proxied(Path(urlsplit(settings.redis_url).path)) as proxy:
        yield proxy


@pytest.fixture
async def far(buffer: Buffer, settings: Settings, proxy: Proxy) -> AsyncIterator[Buffer]:
    """A buffer whose way to Redis leads through the proxy; ``buffer`` itself flushes beside it."""
    changes = {"redis_url": f"redis://127.0.0.1:{proxy.port}", "redis_timeout_seconds": 5.0}
    async with Buffer.connect(settings.model_copy(update=changes)) as far:
        await on_path(far, "stream")
        yield far


async def _close_path(buffer: Buffer) -> None:
    epochs = {shard: state.epoch for shard, state in enumerate(buffer.runtime.member.states)}
    assert await buffer.runtime.paths.close("test", epochs, "a test", unless_seen_seconds=None)


async def _is_connecting(buffer: Buffer) -> None:
    """A batch waits for a connection that does not come about."""
    coalescer = buffer.runtime.coalescer
    await eventually(lambda: coalescer._under_way and not coalescer._link.connected)


async def _appends(conversation: Conversation, numbers: range) -> list[asyncio.Task[Any]]:
    return [asyncio.create_task(conversation.append({"n": n}, id=f"m-{n}")) for n in numbers]


async def _answers_are_right(conversation: Conversation, appends: list[asyncio.Task[Any]]) -> None:
    """Each caller got the receipt of its own item, and items stand in the order of the calls."""
    receipts = [await append for append in appends]
    receipts += [await conversation.append({"n": n}, id=f"m-{n}") for n in range(len(appends), 10)]
    items = (await conversation.items()).items
    assert [(item.id, item.position) for item in items] == [(r.id, r.position) for r in receipts]
    assert [item["n"] for item in items] == list(range(10))


async def _nothing_is_waiting(buffer: Buffer) -> None:
    coalescer, retention = buffer.runtime.coalescer, buffer.runtime.member.retention
    await eventually(lambda: (coalescer.operations, coalescer.bytes) == (0, 0), seconds=3)
    await eventually(lambda: (retention.turns, retention.bytes) == (0, 0), seconds=3)


async def test_path_that_changes_while_a_batch_waits_for_a_connection_mixes_up_no_replies(
    far: Buffer, proxy: Proxy
) -> None:
    """The batch goes another way, in its order; what comes later on that connection is its own."""
    conversation = far.conversation("c")
    appends = await _appends(conversation, range(1))
    await appends[0]
    proxy.stall()
    proxy.cut_all()
    appends += await _appends(conversation, range(1, 4))
    await _is_connecting(far)
    await _close_path(far)
    await eventually(lambda: modes(far) != {"stream"})
    proxy.resume()
    await _answers_are_right(conversation, appends)
    await _nothing_is_waiting(far)


async def test_batch_that_is_put_back_while_it_waits_for_a_connection_mixes_up_no_replies(
    far: Buffer, proxy: Proxy
) -> None:
    """The receiving side still had a wake-up of the connection before, and gave the batch up."""
    conversation = far.conversation("c")
    appends = await _appends(conversation, range(1))
    await appends[0]
    proxy.stall()
    proxy.cut_all()
    appends += await _appends(conversation, range(1, 4))
    await _is_connecting(far)
    far.runtime.coalescer._to_receive.set()
    await eventually(lambda: not far.runtime.coalescer._under_way)
    proxy.resume()
    await _answers_are_right(conversation, appends)
    await _nothing_is_waiting(far)


async def test_batch_of_an_epoch_that_is_over_is_not_waited_for(far: Buffer, proxy: Proxy) -> None:
    """Its reply would be no ack, and may never come."""
    coalescer, conversation = far.runtime.coalescer, far.conversation("c")
    await conversation.append({"n": "its connection is made"})
    proxy.stall_replies()
    (append,) = await _appends(conversation, range(1))
    await eventually(lambda: coalescer._under_way)
    await _close_path(far)
    await eventually(lambda: not coalescer._under_way, seconds=2)  # the link itself waits 5 s
    assert not append.done()
    proxy.resume()
    await append
    await _nothing_is_waiting(far)


async def test_appends_that_wait_for_the_path_keep_their_order(far: Buffer) -> None:
    """Begun one after the other while nothing is taken: they stand in that order."""
    conversation = far.conversation("c")
    appends = await _appends(conversation, range(1))
    await appends[0]
    await _close_path(far)
    await eventually(lambda: modes(far) != {"stream"})
    appends += await _appends(conversation, range(1, 9))
    await _answers_are_right(conversation, appends)


@pytest.mark.parametrize("count", [1, 3], ids=["item", "batch"])
async def test_item_that_a_reader_was_shown_before_its_ack_is_counted_once(
    buffer: Buffer, count: int
) -> None:
    """Its reply is late, and a read of the same process is faster: retained once, released once."""
    conversation = buffer.conversation("c")
    link = buffer.runtime.coalescer._link
    receive, gate = link.receive, asyncio.Event()

    async def late(*arguments: Any) -> Any:
        reply = await receive(*arguments)
        await gate.wait()
        return reply

    link.receive = late  # type: ignore[method-assign]
    append = asyncio.create_task(conversation.extend([{"n": n} for n in range(count)]))

    async def is_shown() -> bool:
        return len((await conversation.items()).items) == count

    await eventually(is_shown)
    gate.set()
    receipts = await append
    await conversation.flushed(receipts[-1])
    await _nothing_is_waiting(buffer)


async def test_repeat_of_what_is_flushed_is_not_retained_for_long(buffer: Buffer) -> None:
    """Postgres has it, and no newer mark may ever come."""
    conversation = buffer.conversation("c")
    await conversation.append({"n": 1}, id="m-1", durability="stored")
    assert (await conversation.append({"n": 1}, id="m-1")).duplicate
    await _nothing_is_waiting(buffer)


async def test_stored_is_not_claimed_for_an_item_that_stands_elsewhere(
    settings: Settings, postgres: asyncpg.Connection
) -> None:
    """Its id was used anew meanwhile, with an equal body: where it was acked there is nothing."""
    async with Buffer.connect(settings, flusher=True):
        pass
    async with Buffer.connect(settings) as buffer:
        conversation, retention = buffer.conversation("c"), buffer.runtime.member.retention
        append = asyncio.create_task(conversation.append({"n": 1}, id="m-1", durability="stored"))
        await eventually(lambda: retention.turns)
        row = ("default", "c", 7, "m-1", '{"n": 1}')
        await postgres.execute("insert into buffer.items values ($1, $2, $3, $4, now(), $5)", *row)
        await _close_path(buffer)
        async with buffer.runtime.flushing():
            with pytest.raises(OutcomeUnknown) as caught:
                await append
        assert (caught.value.ids, caught.value.level) == (["m-1"], "buffered")
