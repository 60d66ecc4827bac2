"""Accepting processes die, are cut off or stand still, alone or while Redis is lost, and others go on.

At 1,000 appends/s from several processes. What each was told stays true, whoever else fails.
"""

from __future__ import annotations

import asyncio
import logging
import signal
import time
from collections import Counter, defaultdict
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from itertools import chain
from pathlib import Path
from urllib.parse import unquote

import asyncpg
import pytest
from redis.asyncio import Redis

from buffer import Buffer, Settings
from buffer.embedded import EmbeddedServers
from buffer.model.ids import conversation_key, shard_of
from buffer.model.position import epoch_of
from tests.support.ledger import in_postgres
from tests.support.paths import modes, on_path
from tests.support.polling import eventually
from tests.support.processes import Command, Commands
from tests.support.proxy import Fault, Proxy, proxied
from tests.support.writer_process import PAUSE_SECONDS
from tests.support.writers import Writer, Writers, running, settled

pytestmark = pytest.mark.attack

_log = logging.getLogger(__name__)

LONGEST_SILENCE_SECONDS = 5.0  # a heartbeat time-out included
UNNOTICED_SECONDS = 1.5
UNFLUSHED = 60.0  # as a flush interval: nothing is flushed until somebody asks
HEARTBEAT_SECONDS = 1.5
PERMIT_SECONDS = 0.6 * HEARTBEAT_SECONDS
# What a busy machine may add to any time that is measured here.
GRACE_SECONDS = 0.7

_REGISTERED = "select count(*) from buffer.processes where process like '%-' || $1 || '-%'"
_LOST_BY_SHARD = "select shard, sum(turns)::int as turns from buffer.losses group by 1"
_LOST = "select coalesce(sum(turns), 0)::int from buffer.losses"


@pytest.fixture
def hasty(own_settings: Settings) -> Settings:
    """Settings that judge quickly."""
    return own_settings.model_copy(
        update={
            "heartbeat_timeout_seconds": HEARTBEAT_SECONDS,
            "redis_lost_seconds": 0.5,
            "write_off_seconds": 1.0,
            "flush_interval_seconds": 0.3,
        }
    )


@pytest.fixture
async def postgres(own_settings: Settings) -> AsyncIterator[asyncpg.Connection]:
    connection = await asyncpg.connect(own_settings.postgres_url)
    yield connection
    await connection.close()


async def _registered(postgres: asyncpg.Connection, writers: Writers, name: str) -> bool:
    return bool(await postgres.fetchval(_REGISTERED, str(writers[name].child.pid)))


async def _assert_nothing_was_switched(postgres: asyncpg.Connection) -> None:
    """The service never left Redis."""
    assert await postgres.fetch("select distinct path_epoch, mode from buffer.shards") == [(2, "stream")]
    assert await postgres.fetchval("select count(*) from buffer.incarnations") == 0
    assert await postgres.fetchval(_LOST) == 0


async def test_killed_process_leaves_everything_that_it_acked(
    hasty: Settings, commands: Commands, postgres: asyncpg.Connection
) -> None:
    """SIGKILL of one process, Redis intact: all its acks reach Postgres, nobody else notices."""
    async with running(commands, hasty, ("victim", "one", "two")) as (writers, buffer):
        began = time.monotonic()
        writers["victim"].child.kill()
        assert await _registered(postgres, writers, "victim")
        await eventually(lambda: _is_forgotten(postgres, writers, "victim"))
        await writers.acking("stream", ("one", "two"))
        ended = time.monotonic()
        assert not await writers.unread(buffer)
        await writers.stop()
        assert writers.longest_silence(began, ended) < UNNOTICED_SECONDS
        assert not [ack for ack in writers.acks(since=began) if ack.path == "direct"]
        assert all(read.complete for read in writers.reads(since=began))
        await settled(buffer)
        assert not await writers.violations(buffer, postgres)
        await _assert_nothing_was_switched(postgres)


async def _is_forgotten(postgres: asyncpg.Connection, writers: Writers, name: str) -> bool:
    return not await _registered(postgres, writers, name)


@pytest.mark.parametrize("between", ["at once", "put out in between"])
async def test_process_and_redis_lost_lose_only_what_that_process_acked_and_say_so(
    own_servers: EmbeddedServers,
    hasty: Settings,
    commands: Commands,
    postgres: asyncpg.Connection,
    between: str,
) -> None:
    """The one loss that ``buffered`` allows: reads say so until it is written off, then it is counted."""
    slow = hasty.model_copy(update={"flush_interval_seconds": UNFLUSHED})
    async with running(commands, slow, ("victim", "one", "two")) as (writers, buffer):
        if between == "at once":
            own_servers.redis.pause()
        writers["victim"].child.kill()
        if between == "put out in between":
            await eventually(lambda: _is_put_out(buffer, writers["victim"]))
        assert await _registered(postgres, writers, "victim")  # its items are not flushed
        began = time.monotonic()
        await own_servers.redis.kill()
        own_servers.redis.wipe()
        await writers.acking("direct", ("one", "two"), since=began)
        direct = time.monotonic()
        assert not (await buffer.conversation("own-victim-0").context()).complete
        await own_servers.redis.restart()
        back = await writers.acking("stream", ("one", "two"), since=direct)
        assert back - direct > slow.write_off_seconds - GRACE_SECONDS
        _log.info("no ack for %.2f s", writers.longest_silence(began, back))
        assert writers.longest_silence(began, back) < LONGEST_SILENCE_SECONDS
        assert (await buffer.conversation("own-victim-0").context()).complete
        await writers.stop()
        await settled(buffer)
        assert not await writers.violations(buffer, postgres, dead={"victim"})
        await _assert_loss_is_counted(writers, "victim", postgres, hasty.shards)


async def _is_put_out(buffer: Buffer, writer: Writer) -> bool:
    """Whether no grant knows the process any more."""
    async with Redis.from_url(buffer.settings.redis_url, protocol=2) as client:
        fields = [await client.hkeys(keys.shard) for keys in buffer.runtime.shards.keys]
    return not any(b"-%d-" % writer.child.pid in field for field in chain.from_iterable(fields))


async def _assert_loss_is_counted(
    writers: Writers, name: str, postgres: asyncpg.Connection, shards: int
) -> None:
    """Nothing is lost in silence: numbers are dense, so whoever went on knows how many are nowhere.

    But for what the dead process acked last of all in a shard: then no later number is known.
    """
    lost = await writers.missing(name, postgres)
    known: dict[int, int] = defaultdict(int)
    for ack in chain.from_iterable(writer.acks for writer in writers if writer.name != name):
        if ack.path == "stream":
            shard = _shard(ack.conversation, shards)
            known[shard] = max(known[shard], ack.position if epoch_of(ack.position) == 2 else 0)
    certain = Counter(_shard(a.conversation, shards) for a in lost.values())
    within = Counter(
        shard for ack in lost.values() if ack.position < known[shard := _shard(ack.conversation, shards)]
    )
    counted = {r["shard"]: r["turns"] for r in await postgres.fetch(_LOST_BY_SHARD)}
    _log.info("lost %s, of them before what is there %s, counted %s", certain, within, counted)
    assert certain
    assert set(certain) <= set(counted)
    assert all(turns <= counted[shard] for shard, turns in within.items())


def _shard(conversation: str, shards: int) -> int:
    return shard_of(conversation_key("default", conversation), shards)


def _far(settings: Settings, proxy: Proxy, *, postgres: bool = False) -> Settings:
    """The settings of a process whose way to one of the stores leads through a proxy."""
    if postgres:
        url = f"postgresql://postgres@127.0.0.1:{proxy.port}/buffer?sslmode=disable"
        return settings.model_copy(update={"postgres_url": url})
    return settings.model_copy(update={"redis_url": f"redis://127.0.0.1:{proxy.port}"})


@asynccontextmanager
async def _cut_off(proxy: Proxy, how: str) -> AsyncIterator[None]:
    """The network of one process: connections break and are refused, or nothing moves."""
    if how == "cut":
        proxy.refusing = True
        proxy.cut_all()
    else:
        proxy.stall()
    yield
    proxy.refusing = False
    if how == "stalled":
        proxy.cut_all()  # what stood still for so long is not delivered any more
        proxy.resume()


@pytest.mark.parametrize("how", ["cut", "stalled"])
async def test_process_cut_off_from_redis_alone_refuses_and_rejoins(
    own_servers: EmbeddedServers,
    hasty: Settings,
    commands: Commands,
    postgres: asyncpg.Connection,
    how: str,
) -> None:
    """It answers at once that others should be asked, never goes direct, and the service stays in Redis."""
    socket = Path(own_servers.redis.url.removeprefix("unix://"))
    async with proxied(socket) as proxy:
        settings = {"far": _far(hasty, proxy), "one": hasty, "two": hasty}
        async with running(commands, hasty, settings) as (writers, buffer):
            began = time.monotonic()
            async with _cut_off(proxy, how):
                # Until it knows that the service stays in Redis, its appends wait.
                knows = began + 3 * hasty.redis_lost_seconds + hasty.redis_timeout_seconds + GRACE_SECONDS
                refused = await eventually(lambda: _refusals(writers, "far", knows))
                assert not writers["far"].acks_since(began + GRACE_SECONDS)
                assert not await writers.unread(buffer)
            healed = time.monotonic()
            back = await writers.acking("stream", ("far",), since=healed)
            await writers.at_pace()
            ended = time.monotonic()
            await writers.stop()
            slowest = max(attempt.seconds for attempt in refused)
            _log.info("%s: refused within %.4f s, back after %.2f s", how, slowest, back - healed)
            assert slowest < 0.5
            assert writers.longest_silence(began, ended) < UNNOTICED_SECONDS
            # What was taken before the cut, and flushed, is found in Postgres when it is repeated.
            assert not [a for a in writers.acks(since=began) if a.path == "direct" and not a.duplicate]
            await settled(buffer)
            assert not await writers.violations(buffer, postgres)
            await _assert_nothing_was_switched(postgres)


def _refusals(writers: Writers, name: str, since: float) -> list:
    """What a process answered after a moment; none yet if it is too few to judge."""
    writers.update()
    answers = [attempt for attempt in writers[name].failed if attempt.at > since]
    return answers if len(answers) > 40 else []


@pytest.mark.parametrize("woken", ["in direct", "in the stream", "written off"])
async def test_process_stopped_through_a_whole_switch_and_woken_violates_nothing(
    own_servers: EmbeddedServers,
    hasty: Settings,
    commands: Commands,
    postgres: asyncpg.Connection,
    woken: str,
) -> None:
    """SIGSTOP past its heartbeat; Redis dies, the service goes direct and back; SIGCONT: it joins again."""
    # With ``always`` what is acked is in the file; what ``everysec`` may lose is a matter of the disk.
    await own_servers.redis.stop()
    own_servers.redis.config["appendfsync"] = "always"
    await own_servers.redis.restart()
    slow = hasty.model_copy(update={"flush_interval_seconds": UNFLUSHED, "write_off_seconds": 0.5})
    # Whatever it finds when it wakes is not dropped for having taken too long.
    patient = slow.model_copy(update={"redis_timeout_seconds": 30.0})
    settings = {"victim": patient, "one": slow, "two": slow}
    async with running(commands, slow, settings) as (writers, buffer):
        victim = writers["victim"].child
        began = await _stop_with_replies_under_way(own_servers, victim)
        await writers.acking("stream", ("one", "two"), since=began + 0.2)  # they have the twins, too
        await own_servers.redis.kill()
        await writers.acking("direct", ("one", "two"), since=began)
        assert await writers.missing("victim", postgres)
        if woken != "in the stream":
            own_servers.redis.wipe()  # then the victim alone has what it acked
        if woken == "in direct":
            victim.send(signal.SIGCONT)
            await writers.acking("direct", ("victim",))
        await own_servers.redis.restart()
        back = await writers.acking("stream", ("one", "two"))
        victim.send(signal.SIGCONT)
        await writers.acking("stream", ("victim",), since=back)
        assert await _registered(postgres, writers, "victim")
        await writers.stop()
        _log.info("no ack for %.2f s; %s", writers.longest_silence(began, back), writers.summary())
        assert writers.longest_silence(began, back) < LONGEST_SILENCE_SECONDS
        await settled(buffer)
        if woken == "written off":
            await _assert_kept_aside(writers, buffer, postgres, began)
        else:
            assert not await writers.violations(buffer, postgres)
            assert await postgres.fetchval("select count(*) from buffer.dead_letters") == 0


async def _stop_with_replies_under_way(servers: EmbeddedServers, victim: Command) -> float:
    """SIGSTOP a process that will find answers of Redis when it wakes; when it stopped."""
    servers.redis.pause()
    await asyncio.sleep(2 * PAUSE_SECONDS)  # in which its clients send something
    victim.send(signal.SIGSTOP)
    stopped = time.monotonic()
    servers.redis.resume()
    return stopped


async def _assert_kept_aside(
    writers: Writers, buffer: Buffer, postgres: asyncpg.Connection, stopped: float
) -> None:
    """Reads were complete without what was written off, so it stays out; it is kept, and reads say so."""
    assert not await writers.violations(buffer, postgres, dead={"victim"})
    missing = await writers.missing("victim", postgres)
    letters = await postgres.fetch("select conversation, item_id from buffer.dead_letters")
    assert missing
    assert all(ack.at < stopped for ack in missing.values()), "acked after it was written off"
    assert set(missing) == {(row["conversation"], row["item_id"]) for row in letters}
    for conversation in {conversation for conversation, _ in missing}:
        assert not (await buffer.conversation(conversation).context()).complete


async def test_process_cut_off_from_postgres_alone_stops_acking_within_its_permit_and_rejoins(
    hasty: Settings, commands: Commands, postgres: asyncpg.Connection
) -> None:
    """Nobody can tell it from a dead one, so it must not ack when it may have been written off."""
    directory = unquote(hasty.postgres_url.partition("?host=")[2])
    async with proxied(Path(directory) / ".s.PGSQL.5432") as proxy:
        settings = {"far": _far(hasty, proxy, postgres=True), "one": hasty, "two": hasty}
        async with running(commands, hasty, settings) as (writers, buffer):
            began = time.monotonic()
            async with _cut_off(proxy, "stalled"):
                await eventually(lambda: _is_forgotten(postgres, writers, "far"))
                forgotten = time.monotonic()
                await writers.acking("stream", ("one", "two"))
                assert not await writers.unread(buffer)
                late = writers["far"].acks_since(began)
            back = await writers.acking("stream", ("far",))
            await writers.at_pace()
            ended = time.monotonic()
            await writers.stop()
            last = max(ack.at for ack in late) - began
            _log.info("acked for %.2f s, forgotten after %.2f s", last, forgotten - began)
            assert last < PERMIT_SECONDS + GRACE_SECONDS / 2
            assert writers.longest_silence(began, ended) < UNNOTICED_SECONDS
            assert back < ended
            await settled(buffer)
            assert not await writers.violations(buffer, postgres)
            await _assert_nothing_was_switched(postgres)


@pytest.mark.parametrize("first", ["lost with Redis", "shown to a reader", "flushed"])
async def test_append_whose_reply_is_lost_and_that_goes_direct_is_stored_once(
    own_servers: EmbeddedServers, hasty: Settings, postgres: asyncpg.Connection, first: str
) -> None:
    """Redis took it, its reply is lost, Redis dies: the retry of the same id has one position for ever."""
    patient = hasty.model_copy(update={"flush_interval_seconds": UNFLUSHED})
    socket = Path(own_servers.redis.url.removeprefix("unix://"))
    async with (
        Buffer.connect(patient, flusher=True) as near,
        proxied(socket) as proxy,
        Buffer.connect(_far(patient, proxy)) as far,
    ):
        await on_path(far, "stream")
        conversation, other = far.conversation("c"), near.conversation("c")
        before = await conversation.append({"content": "before"}, id="m-1")
        proxy.once(Fault.CUT_BEFORE_REPLY, b"needle")
        proxy.refusing = True
        append = asyncio.create_task(conversation.append({"content": "needle"}, id="m-2"))
        await proxy.struck.wait()
        shown = None
        if first != "lost with Redis":
            shown = (await other.items()).items[-1]
            assert shown.id == "m-2"
        if first == "flushed":
            await near.flush()
        await own_servers.redis.kill()
        receipt = await append
        assert (receipt.path, receipt.level) == ("direct", "stored")
        assert receipt.duplicate == (first != "lost with Redis")
        assert receipt.position > before.position
        assert shown is None or shown.position == receipt.position
        await _assert_same_receipt((far, near), receipt.position)
        await own_servers.redis.restart()  # with its file, in which the first attempt stands
        proxy.refusing = False
        await eventually(lambda: modes(near) | modes(far) == {"stream"})
        await _assert_same_receipt((far, near), receipt.position)
        last = await conversation.append({"content": "after"}, id="m-3")
        assert last.path == "stream"
        await conversation.flushed(last)
    contents = await in_postgres(postgres)
    assert [(item.id, item.position) for item in contents["c"]] == [
        (r.id, r.position) for r in (before, receipt, last)
    ]


async def _assert_same_receipt(buffers: tuple[Buffer, ...], position: int) -> None:
    """Repeats through any process get the first receipt, and reads show one item at its position."""
    for buffer in buffers:
        again = await buffer.conversation("c").append({"content": "needle"}, id="m-2")
        assert (again.position, again.duplicate) == (position, True)
        page = await buffer.conversation("c").items()
        assert page.complete
        assert [item.position for item in page.items if item.id == "m-2"] == [position]
