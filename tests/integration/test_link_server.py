"""A link and the server at its other end: only the incarnation that is expected is ever asked."""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import AsyncIterator
from pathlib import Path
from urllib.parse import urlsplit

import pytest
from redis.asyncio import Redis

from buffer.embedded import EmbeddedServers, RedisServer
from buffer.settings import Settings
from buffer.stream.client import RedisClient
from buffer.stream.link import Calls, LinkLost, WrongServer
from tests.conftest import REDIS_BINARY
from tests.support.proxy import Proxy, proxied

PING = (b"PING",)


class Far:
    """A link through a proxy that leads to one of two servers; ``expected`` is what the link expects."""

    def __init__(self, proxy: Proxy, servers: list[RedisServer]) -> None:
        self.proxy = proxy
        self.servers = servers
        self.expected: str | None = None
        self.client = RedisClient(
            Settings(_env_file=None, redis_url=f"redis://127.0.0.1:{proxy.port}", redis_timeout_seconds=5.0)
        )
        self.link = self.client.link(lambda: self.expected)

    def lead_to(self, number: int) -> None:
        """As a failover does: open connections break, new ones lead there."""
        self.proxy._upstream = Path(urlsplit(self.servers[number].url).path)
        self.proxy.cut_all()

    async def ping(self) -> list[object]:
        """One round trip; a connection that has just been cut may be noticed only by it."""
        try:
            return await self.link.round_trip([PING])
        except WrongServer:
            raise
        except LinkLost:
            return await self.link.round_trip([PING])


@pytest.fixture
async def far(servers: EmbeddedServers, tmp_path: Path) -> AsyncIterator[Far]:
    async with (
        RedisServer(tmp_path, binary=REDIS_BINARY) as other,
        proxied(Path(urlsplit(servers.redis.url).path)) as proxy,
    ):
        far = Far(proxy, [servers.redis, other])
        yield far
        await far.link.close()
        await far.client.close()


async def run_id(server: RedisServer) -> str:
    async with Redis.from_url(server.url) as client:
        return str((await client.info("server"))["run_id"])


async def test_link_without_an_expectation_takes_any_server_and_tells_which(far: Far) -> None:
    """That is how a manager finds out what is there."""
    for number in (0, 1, 0):
        far.lead_to(number)
        assert await far.ping() == [b"PONG"]
        assert far.link.run_id == await run_id(far.servers[number])


async def test_link_refuses_another_server_and_works_again_when_the_expected_one_is_back(far: Far) -> None:
    """Time after time, and nothing is sent to the other one meanwhile."""
    far.expected = await run_id(far.servers[0])
    assert await far.ping() == [b"PONG"]
    far.lead_to(1)
    with pytest.raises(LinkLost):  # the connection that was cut
        await far.link.round_trip([PING])
    for _ in range(3):
        with pytest.raises(WrongServer) as caught:
            await far.link.round_trip([(b"SET", b"nobody", b"1")])
        assert not caught.value.sent
    async with Redis.from_url(far.servers[1].url) as client:
        assert await client.exists("nobody") == 0
    far.lead_to(0)
    assert await far.ping() == [b"PONG"]


async def test_open_connection_is_not_used_once_another_server_is_expected(far: Far) -> None:
    """The path has moved on while the old primary still answers."""
    far.expected = await run_id(far.servers[0])
    await far.ping()
    far.expected = await run_id(far.servers[1])
    with pytest.raises(WrongServer):
        await far.link.round_trip([PING])
    far.lead_to(1)
    assert await far.ping() == [b"PONG"]


async def test_server_that_restarted_is_another_one(far: Far) -> None:
    """It may have lost what the incarnation before it had acked, whatever its file says."""
    far.lead_to(1)
    far.expected = await run_id(far.servers[1])
    await far.ping()
    await far.servers[1].stop()
    await far.servers[1].restart()
    with pytest.raises(LinkLost):
        await far.link.round_trip([PING])
    with pytest.raises(WrongServer):
        await far.link.round_trip([PING])
    far.expected = await run_id(far.servers[1])
    assert await far.ping() == [b"PONG"]


async def test_shared_calls_fail_and_work_with_their_link(far: Far) -> None:
    """Nobody waits for a server that is not the expected one."""
    calls = Calls(far.link)
    task = asyncio.create_task(calls.run())
    far.expected = await run_id(far.servers[0])
    assert await calls.submit([PING, PING]) == [b"PONG", b"PONG"]
    far.lead_to(1)
    with pytest.raises(LinkLost):
        await calls.submit([PING])
    with pytest.raises(WrongServer):
        await calls.submit([PING])
    far.lead_to(0)
    assert await calls.submit([PING]) == [b"PONG"]
    task.cancel()
    await asyncio.wait([task])


async def test_abort_ends_the_wait_for_a_reply(far: Far) -> None:
    """At once, and the next call gets no reply that belongs to the one before."""
    await far.ping()
    far.proxy.stall_replies()
    waiting = asyncio.create_task(far.link.round_trip([(b"ECHO", b"old")]))
    done, _ = await asyncio.wait({waiting}, timeout=0.05)
    assert not done
    began = time.monotonic()
    far.link.abort()
    with pytest.raises(LinkLost):
        await waiting
    assert time.monotonic() - began < 1
    far.proxy.resume()
    assert await far.link.round_trip([(b"ECHO", b"new")]) == [b"new"]


async def test_send_in_the_turn_of_an_abort_leaves_nothing_behind(settings: Settings) -> None:
    """A write to a transport that is gone would haunt the next socket of the same number."""
    link = RedisClient(settings).link()
    for _ in range(20):
        assert await link.round_trip([PING]) == [b"PONG"]
        link.abort()
        assert not link.connected
        assert await asyncio.wait_for(link.round_trip([PING]), 2) == [b"PONG"]
    await link.close()
    await asyncio.sleep(0)
    selector = asyncio.get_running_loop()._selector  # type: ignore[attr-defined]
    for key in list(selector.get_map().values()):
        os.fstat(key.fd)  # raises for one that is closed
