"""The scripts of the grant: whom they refuse, what a fence ends, and that a grant counts once."""

from __future__ import annotations

import itertools
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from redis.asyncio import Redis

from buffer.embedded import EmbeddedServers, RedisServer
from buffer.model.ids import id_digest
from buffer.model.record import encode_header
from buffer.settings import Settings
from buffer.stream import scripts
from buffer.stream.client import RedisClient
from buffer.stream.grants import Fence, Grants
from buffer.stream.keys import ShardKeys
from buffer.stream.link import Link, script_call
from buffer.stream.shards import OutOfMemory, Refused, checked
from tests.conftest import REDIS_BINARY

_numbers = itertools.count(1)

EPOCH = 4


class Shard:
    """Shard 0 of some Redis, with each script as a method; the caller's name is ``p`` if none is given."""

    def __init__(self, link: Link, prefix: str) -> None:
        self.link = link
        self.keys = ShardKeys(prefix, 0)
        self.grants = Grants(link, [self.keys])

    async def _run(self, script: scripts.Script, keys: tuple[bytes, ...], *args: object) -> Any:
        given = [a if isinstance(a, bytes) else str(a).encode() for a in args]
        (reply,) = await self.link.round_trip([script_call(script, keys, given)])
        return checked(reply)

    async def append(self, epoch: int = EPOCH, item: str = "m", who: str = "p", data: bytes = b"{}") -> int:
        k = self.keys
        header = encode_header("t/c", item, None, 1_732_368_000_123, None, False)
        body = (id_digest("t/c", item), b"8 bytes.", header, data)
        where = (k.stream, k.shard, k.ids, k.ids_old, k.leases)
        _, answer = await self._run(scripts.APPEND, where, epoch, f"@{who}", "t/c", 1, "", *body)
        return int(answer.lstrip(b"d"))

    async def tail(self, epoch: int = EPOCH, who: str = "p") -> list[bytes]:
        where = (self.keys.stream, self.keys.shard)
        _, _, *entries = await self._run(scripts.TAIL, where, epoch, "t/c", 10, "", f"@{who}")
        return [entry_id for entry_id, _, _ in entries]

    async def lease(self, epoch: int = EPOCH, who: str = "p") -> Any:
        return await self._run(
            scripts.LEASE, (self.keys.shard, self.keys.leases), epoch, "t/c", "token", f"@{who}"
        )

    async def ask(self, epoch: int = EPOCH, who: str = "p") -> list[int]:
        found: list[int] = await self._run(
            scripts.ASK, (self.keys.shard, self.keys.managers), epoch, f"@{who}"
        )
        return found

    async def join(self, epoch: int = EPOCH, who: str = "p") -> None:
        await self._run(scripts.JOIN, (self.keys.shard,), epoch, f"@{who}")

    async def kick(self, epoch: int = EPOCH, who: str = "p") -> int:
        return await self.grants.kick(0, epoch, who)

    async def report(self, epoch: int = EPOCH, knew: int = 0, who: str = "m") -> int:
        return (await self.grants.report({0: epoch}, who, {0: knew}))[0]

    async def settle(self, epoch: int = EPOCH, before: int = -1, after: int = 0) -> int:
        k = self.keys
        where = (k.stream, k.shard, k.leases, k.fills, k.view(epoch, b"t/c"))
        views = (60_000, 4_096, 10, "n")
        return int(await self._run(scripts.SETTLE, where, epoch, before, after, 10, *views, "t/c"))

    async def rotate(self, epoch: int = EPOCH) -> int:
        k = self.keys
        where = (k.stream, k.shard, k.ids, k.ids_old, k.leases, k.fills)
        return int(await self._run(scripts.ROTATE, where, epoch, 0))

    async def fence(self, epoch: int, nonce: str = "n") -> Fence:
        return await self.grants.fence(0, epoch, nonce)

    async def open(self, epoch: int = EPOCH) -> None:
        """Grant an epoch to process ``p``; manager ``m`` is known in it."""
        fence = await self.fence(epoch - 1, f"for {epoch}")
        assert await self.grants.grant(0, epoch, fence.text, ["p"], ["m"])


Snapshot = Callable[[], Awaitable[dict[bytes, bytes]]]


@pytest.fixture
async def shard(servers: EmbeddedServers) -> AsyncIterator[Shard]:
    async with _shard(servers.redis.url) as shard:
        yield shard


@asynccontextmanager
async def _shard(url: str) -> AsyncIterator[Shard]:
    client = RedisClient(Settings(_env_file=None, redis_url=url))
    link = client.link()
    try:
        yield Shard(link, f"grants{next(_numbers)}")
    finally:
        await link.close()
        await client.close()


@pytest.fixture
def contents(shard: Shard) -> Snapshot:
    """Every key of the shard, byte for byte."""

    async def contents() -> dict[bytes, bytes]:
        (keys,) = await shard.link.round_trip([(b"KEYS", shard.keys.stream.replace(b"stream", b"*"))])
        return dict(zip(keys, await shard.link.round_trip([(b"DUMP", key) for key in keys]), strict=True))

    return contents


# --- who is refused

_EPOCH_SCRIPTS = ["append", "tail", "lease", "ask", "join", "kick", "report", "settle", "rotate"]
_MEMBER_SCRIPTS = ["append", "tail", "lease", "ask"]


@pytest.mark.parametrize("name", _EPOCH_SCRIPTS)
async def test_script_refuses_a_caller_of_another_epoch(shard: Shard, contents: Snapshot, name: str) -> None:
    """Older and newer; and everybody behind a fence, and where there is nothing. Nothing is changed."""
    call = getattr(shard, name)
    with pytest.raises(Refused, match="not open"):
        await call(epoch=EPOCH)
    await shard.open()
    await shard.append(item="first")
    before = await contents()
    for epoch in (EPOCH - 1, EPOCH + 1, 40):
        with pytest.raises(Refused):
            await call(epoch=epoch)
    assert await contents() == before
    await call()
    await shard.fence(EPOCH)
    before = await contents()
    with pytest.raises(Refused, match="not open"):
        await call(epoch=EPOCH)
    assert await contents() == before


@pytest.mark.parametrize("name", _MEMBER_SCRIPTS)
async def test_script_refuses_who_is_not_a_member(shard: Shard, contents: Snapshot, name: str) -> None:
    """Before it has joined, and after it was put out; and again welcome when it joins anew."""
    call = getattr(shard, name)
    await shard.open()
    before = await contents()
    with pytest.raises(Refused, match="member"):
        await call(who="q")
    assert await contents() == before
    await shard.join(who="q")
    await call(who="q")
    await shard.kick(who="q")
    with pytest.raises(Refused, match="member"):
        await call(who="q")
    await call(who="p")
    await shard.join(who="q")


# --- kick


async def test_kick_tells_the_last_number_that_was_given_out(shard: Shard) -> None:
    """Of whoever it was given to; flushed or not; -1 while there is none."""
    await shard.open()
    assert await shard.kick(who="nobody") == -1
    for number in range(3):
        assert await shard.append(item=f"m-{number}") == number
    assert await shard.kick(who="nobody") == 2
    await shard.settle(after=2)
    assert await shard.tail() == []
    assert await shard.kick() == 2
    with pytest.raises(Refused):
        await shard.append(item="late")
    assert await shard.kick() == 2


# --- fence


async def test_fence_ends_an_older_grant_and_tells_which(shard: Shard) -> None:
    """And how many entries stand behind it; they stay until the next grant."""
    await shard.open()
    await shard.append()
    fence = await shard.fence(EPOCH + 1, "nonce")
    assert fence == Fence(f"{EPOCH + 1}/nonce/{EPOCH}", EPOCH, 1)
    (stands,) = await shard.grants.probe([0])
    assert (stands.epoch, stands.fence) == (None, fence.text)
    assert [e[0] for e in await shard.grants.entries(0, EPOCH, -1, 10)] == [b"%d-0" % EPOCH]


async def test_managers_who_race_agree_on_one_fence(shard: Shard) -> None:
    """The second of the same epoch gets the first one's; also one that is late, with an older epoch."""
    await shard.open()
    first = await shard.fence(EPOCH + 1, "first")
    assert await shard.fence(EPOCH + 1, "second") == first
    assert await shard.fence(EPOCH, "late") == first


async def test_fence_of_a_newer_epoch_replaces_an_older_one(shard: Shard) -> None:
    """No grant came in between, so it ended none: this Redis held nothing of the epoch before."""
    await shard.open()
    await shard.fence(EPOCH + 1, "first")
    assert await shard.fence(EPOCH + 3, "second") == Fence(f"{EPOCH + 3}/second/", None, 0)


async def test_fence_of_an_epoch_that_is_over_is_refused(shard: Shard, contents: Snapshot) -> None:
    """A manager that slept through the return cannot end the new grant."""
    await shard.open()
    before = await contents()
    with pytest.raises(Refused):
        await shard.fence(EPOCH - 1, "late")
    assert await contents() == before


async def test_fence_in_an_empty_redis(shard: Shard) -> None:
    """There is nothing to end, and nothing behind it."""
    assert await shard.fence(7) == Fence("7/n/", None, 0)


# --- grant


async def test_grant_empties_the_shard_and_counts_from_zero(shard: Shard) -> None:
    """Entries, ids, tails, leases and members of the epoch before are gone."""
    await shard.open()
    await shard.lease()
    for number in range(3):
        await shard.append(item=f"m-{number}")
    await shard.join(who="q")
    await shard.open(EPOCH + 2)
    assert await shard.tail(EPOCH + 2) == []
    assert await shard.append(EPOCH + 2, item="m-1") == 0
    assert await shard.link.round_trip([(b"EXISTS", shard.keys.leases)]) == [0]
    with pytest.raises(Refused, match="member"):
        await shard.append(EPOCH + 2, who="q")


async def test_second_grant_wipes_nothing(shard: Shard, contents: Snapshot) -> None:
    """It counts over its fence only, which the first one took down; both managers hear that it stands."""
    fence = await shard.fence(EPOCH - 1)
    assert await shard.grants.grant(0, EPOCH, fence.text, ["p"], [])
    await shard.append()
    before = await contents()
    assert await shard.grants.grant(0, EPOCH, fence.text, ["p", "q"], ["m"])
    assert await contents() == before


async def test_grant_that_arrives_late_wipes_nothing(shard: Shard, contents: Snapshot) -> None:
    """By then another fence stands, or the grant of a later epoch, or nothing at all."""
    late = await shard.fence(EPOCH - 1, "late")

    async def is_without_effect() -> None:
        before = await contents()
        assert not await shard.grants.grant(0, EPOCH, late.text, ["p"], ["m"])
        assert await contents() == before

    await shard.fence(EPOCH + 1, "another")
    await is_without_effect()
    await shard.open(EPOCH + 2)
    await shard.append(EPOCH + 2)
    await is_without_effect()
    await shard.link.round_trip([(b"UNLINK", shard.keys.shard, shard.keys.stream)])
    await is_without_effect()


# --- ask, report


async def test_question_is_answered_once_every_manager_knew_of_it(shard: Shard) -> None:
    """An answer speaks for the questions that its manager had heard of, and for no later one."""
    fence = await shard.fence(EPOCH - 1)
    await shard.grants.grant(0, EPOCH, fence.text, ["p"], ["m", "n"])
    assert await shard.ask() == [1, 0]
    heard = await shard.report(knew=0, who="m")
    assert heard == 1
    assert await shard.ask() == [2, 0]
    await shard.report(knew=heard, who="m")
    assert await shard.ask() == [3, 0], "the other one has not answered"
    await shard.report(knew=2, who="n")
    assert await shard.ask() == [4, 1]
    await shard.report(knew=0, who="m")  # delivered late
    assert await shard.ask() == [5, 1]
    await shard.report(knew=5, who="m")
    assert await shard.ask() == [6, 2]


async def test_manager_that_makes_itself_known_is_waited_for_until_it_is_dismissed(shard: Shard) -> None:
    """From its first word on, nobody goes on without it."""
    await shard.open()
    await shard.ask()
    await shard.report(knew=1)
    assert await shard.ask() == [2, 1]
    await shard.report(knew=0, who="new")
    assert await shard.ask() == [3, 0]
    await shard.grants.dismiss([0], "new")
    assert await shard.ask() == [4, 1]


async def test_without_a_manager_nothing_is_answered(shard: Shard) -> None:
    """Nobody is there who could say that Postgres is away for all."""
    await shard.open()
    await shard.report(knew=9)
    await shard.grants.dismiss([0], "m")
    assert await shard.ask() == [1, 0]


# --- a full Redis


async def _fill(shard: Shard) -> int:
    """Append until the first refusal; how many there are then."""
    for number in range(1_000):
        try:
            assert await shard.append(item=f"m-{number}", data=b"x" * 50_000) == number
        except OutOfMemory:
            return number
    raise AssertionError


async def test_full_redis_still_lets_itself_be_drained_and_granted(tmp_path: Path) -> None:
    """Appends are refused whole; settle, kick, join, fence and grant run, and then appends do again."""
    async with (
        RedisServer(tmp_path, binary=REDIS_BINARY) as server,
        Redis.from_url(server.url, protocol=2) as redis,
        _shard(server.url) as shard,
    ):
        await shard.open()
        used = (await redis.info("memory"))["used_memory"]
        await redis.config_set("maxmemory", used + (1 << 20))
        number = await _fill(shard)
        assert number > 5
        assert len(await shard.tail()) == min(10, number)
        await redis.config_set("maxmemory", used // 2)  # whatever is settled, it stays full
        assert await shard.settle(after=2) == 2
        assert await shard.kick() == number - 1
        await shard.join()
        assert await shard.ask() == [1, 0]
        assert await shard.report() == 1
        with pytest.raises(OutOfMemory):
            await shard.append(item="more")
        fence = await shard.fence(EPOCH + 1)
        assert fence.entries == number - 3
        assert await shard.grants.grant(0, EPOCH + 2, fence.text, ["p"], ["m"])
        assert await shard.rotate(EPOCH + 2) == 1
        await redis.config_set("maxmemory", used + (1 << 20))
        assert await shard.append(EPOCH + 2) == 0
