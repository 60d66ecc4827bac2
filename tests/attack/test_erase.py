"""Erasures, deletions and pops race with appends while something dies: the erased never comes back.

Several processes change the same conversations; see `tests.support.changers` for what is held against what.
After everything has settled the path changes once more, which brings every copy that is still held.
"""

from __future__ import annotations

import asyncio
import logging
import shutil
import signal
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from urllib.parse import unquote, urlsplit

import asyncpg
import pytest

from buffer import Buffer, Settings
from buffer.embedded import EmbeddedServers
from buffer.faults import POINTS
from tests.support.changers import Changers, settled
from tests.support.paths import on_path
from tests.support.polling import eventually
from tests.support.processes import Commands
from tests.support.proxy import Fault, proxied

pytestmark = pytest.mark.attack

_log = logging.getLogger(__name__)

_HASTY = {
    "redis_lost_seconds": 0.5,
    "heartbeat_timeout_seconds": 1.5,
    "write_off_seconds": 1.0,
    "flush_interval_seconds": 0.2,
    "cache_ttls": {"conversation": 0.03},  # so that views are filled again and again
}


@asynccontextmanager
async def changing(
    commands: Commands, settings: Settings, *, flusher: bool = True
) -> AsyncIterator[tuple[Changers, Buffer]]:
    """Two processes at work, and a `Buffer` beside them, with a flusher."""
    changers = Changers(commands)
    for name in ("one", "two"):
        changers.start(name, settings)
    async with Buffer.connect(settings, flusher=flusher) as buffer:
        yield changers, buffer


async def hold(changers: Changers, buffer: Buffer, settings: Settings, *, dead: tuple[str, ...] = ()) -> None:
    """End it; nothing that must not be is there, nor after one more change of the path."""
    await changers.stop()
    _log.info("%s", changers.summary())
    postgres = await asyncpg.connect(settings.postgres_url)
    try:
        await on_path(buffer, "stream")
        await settled(buffer)
        assert not await changers.violations(buffer, postgres, dead=dead)
        epochs = [state.epoch for state in buffer.runtime.member.states]
        for shard, epoch in enumerate(epochs):
            await buffer.runtime.member.lose(shard, epoch, "the test says so")
        await eventually(
            lambda: all(s.epoch > e + 1 for s, e in zip(buffer.runtime.member.states, epochs, strict=True))
        )
        await on_path(buffer, "stream")
        await settled(buffer)
        assert not await changers.violations(buffer, postgres, dead=dead)
    finally:
        await postgres.close()
    happened = changers.happened()
    assert min(happened[kind] for kind in ("append", "pop", "item", "erase", "read")) >= 3, happened


async def test_erased_stays_away_when_the_flusher_dies_at_each_crash_point(
    settings: Settings, commands: Commands
) -> None:
    """SIGKILL before a flush, in its COPY, after its commit, in the middle of its settling."""
    hasty = settings.model_copy(update=_HASTY | {"lease_seconds": 0.4})
    first = commands.flusher(hasty)
    async with changing(commands, hasty, flusher=False) as (changers, buffer):
        await changers.at_work()
        first.kill()
        for point in POINTS:
            dying = commands.flusher(hasty, crash_at=point)
            assert await eventually(lambda dying=dying: dying.exit_code) == -signal.SIGKILL, dying.text
        commands.flusher(hasty)
        await changers.at_work(more=1)
        await hold(changers, buffer, hasty)


class Outage:
    """What happens to Redis."""

    def __init__(self, servers: EmbeddedServers, changers: Changers) -> None:
        self._redis = servers.redis
        self._changers = changers

    async def killed(self) -> None:
        """SIGKILL; it comes back with its append-only file."""
        await self._redis.kill()
        await self._redis.restart()

    async def wiped(self) -> None:
        """SIGKILL; it comes back empty."""
        await self._redis.kill()
        self._redis.wipe()
        await self._redis.restart()

    async def older(self) -> None:
        """It comes back with what it held before erasures that succeeded since; a process is gone, too.

        So what it holds is salvaged.
        """
        files = self._redis.directory / "appendonlydir"
        copy = files.with_name("copy")
        shutil.copytree(files, copy)
        await self._changers.at_work(more=6)
        await self._redis.kill()
        self._changers["two"].kill()
        shutil.rmtree(files)
        copy.rename(files)
        await self._redis.restart()


@pytest.mark.parametrize("how", ["killed", "wiped", "older"])
async def test_erased_stays_away_when_redis_is_lost(
    own_servers: EmbeddedServers, own_settings: Settings, commands: Commands, how: str
) -> None:
    """Killed and restarted with its file, without it, or with an older one that holds erased items."""
    hasty = own_settings.model_copy(update=_HASTY)
    async with changing(commands, hasty) as (changers, buffer):
        await changers.at_work()
        happen: Callable[[], Awaitable[None]] = getattr(Outage(own_servers, changers), how)
        await happen()
        await changers.at_work(more=3)
        await hold(changers, buffer, hasty, dead=("two",) if how == "older" else ())


async def test_erased_stays_away_when_an_accepting_process_dies(
    settings: Settings, commands: Commands
) -> None:
    """SIGKILL in the middle of its erasures: each of them has happened, or may have, as a whole."""
    hasty = settings.model_copy(update=_HASTY)
    async with changing(commands, hasty) as (changers, buffer):
        await changers.at_work()
        changers["two"].kill()
        await changers.at_work(more=1)
        await hold(changers, buffer, hasty)


async def test_erased_stays_away_when_postgres_is_stopped(
    own_servers: EmbeddedServers, own_settings: Settings, commands: Commands
) -> None:
    """For two seconds: an erasure that was told to succeed before has happened, the others go on later."""
    hasty = own_settings.model_copy(update=_HASTY | {"heartbeat_timeout_seconds": 5.0})
    async with changing(commands, hasty) as (changers, buffer):
        await changers.at_work()
        await own_servers.postgres.stop()
        await asyncio.sleep(2)  # as the attack says
        await own_servers.postgres.restart()
        await changers.at_work(more=1)
        await hold(changers, buffer, hasty)


@pytest.mark.parametrize("path", ["stream", "direct"])
async def test_erasure_whose_answer_is_lost_covers_what_its_receipt_says(
    settings: Settings, postgres: asyncpg.Connection, path: str
) -> None:
    """The call goes on by itself, and what is appended during and after it is covered by position alone."""
    stream = path == "stream"
    directory = unquote(settings.postgres_url.partition("?host=")[2])
    upstream = Path(urlsplit(settings.redis_url).path) if stream else Path(directory) / ".s.PGSQL.5432"
    match = b"1/e/" if stream else b"COMMIT"
    database = settings.key_prefix
    async with proxied(upstream) as proxy, Buffer.connect(settings, flusher=stream) as buffer:
        await on_path(buffer, path)
        url = (
            {"redis": f"redis://127.0.0.1:{proxy.port}"}
            if stream
            else {"postgres": f"postgresql://postgres@127.0.0.1:{proxy.port}/{database}?sslmode=disable"}
        )
        async with Buffer.connect(settings, **url) as far:
            await on_path(far, path)
            for turn in range(5):
                proxy.once(Fault.CUT_BEFORE_REPLY, match)
                erasing = asyncio.create_task(far.conversation("c").delete())
                acked = []
                while not erasing.done():
                    acked.append(await buffer.conversation("c").append({"turn": turn}))
                assert proxy.struck.is_set()
                acked.append(await buffer.conversation("c").append({"turn": turn}, id="again"))
                through = (await erasing).through
                left = [r.id for r in acked if r.position > through]
                assert left
                assert [i.id for i in (await buffer.conversation("c").items(limit=1_000)).items] == left
                await buffer.flush()
                assert [i.id for i in (await far.conversation("c").items(limit=1_000)).items] == left
        assert len(left) == await postgres.fetchval("select count(*) from buffer.items")
