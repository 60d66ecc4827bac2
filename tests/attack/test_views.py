"""Views under attack: three processes change and read 50 conversations, two flushers settle all the time.

Views are tiny and live for 0.2 s, and are evicted at random. Every read must be one state that its
conversation had while it was under way, see `tests.support.view_history`.
"""

from __future__ import annotations

import asyncio
import json
import logging
import os
import random
import shutil
import signal
import time
from collections import Counter, defaultdict
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from itertools import chain
from pathlib import Path
from typing import Any

import asyncpg
import pytest
from redis.asyncio import Redis

from buffer import Buffer, Settings
from buffer.app.runtime import migrate_database
from buffer.embedded import EmbeddedServers
from buffer.model.record import ERASE, removal
from tests.conftest import REDIS_BINARY, settings_for
from tests.support.paths import modes, on_path
from tests.support.polling import eventually
from tests.support.processes import Command, Commands
from tests.support.view_history import NEVER, Event, Read, faults, moved, states

pytestmark = pytest.mark.attack

_log = logging.getLogger(__name__)

SECONDS = float(os.environ.get("BUFFER_TEST_VIEWS_SECONDS", "5"))
NAMES = ("one", "two", "three")
TINY = {
    "view_max_bytes": 2_000,
    "view_max_items": 5,
    "cache_ttls": {"conversation": 0.2},
    "flush_interval_seconds": 0.01,
    "flush_max_turns": 20,
    "redis_lost_seconds": 1.0,
}


class Histories:
    """What all processes wrote down, put together."""

    def __init__(self, paths: list[Path]) -> None:
        lines = [json.loads(line) for path in paths for line in path.read_bytes().splitlines()]
        of: dict[str, list[list[Any]]] = defaultdict(list)
        for kind, *values in lines:
            of[kind].append(values)
        self.appends, self.removes, self.unread = of["append"], of["remove"], of["unread"]
        self.wrong = [what for _, what in of["wrong"]]
        self.served: Counter[str] = sum((Counter(counts) for (counts,) in of["served"]), Counter())
        self.working = len(of["working"])
        self.reads: dict[str, list[Read]] = defaultdict(list)
        for began, ended, conversation, turns, complete, last, items in of["read"]:
            shown = tuple((item_id, position) for item_id, position in items)
            self.reads[conversation].append(Read(began, ended, turns, complete, last, shown))

    def positions(self, conversation: str, stored: Mapping[str, int]) -> tuple[dict[str, int], list[str]]:
        """Where each item stands, by whoever told it; and those of which different things were told."""
        told: list[dict[str, int]] = [dict(stored)]
        told += [
            dict(zip(ids, positions, strict=True))
            for _, _, name, ids, _, positions in self.appends
            if name == conversation and positions
        ]
        shown = [dict(read.items) for read in self.reads[conversation]]
        at: dict[str, int] = {}
        for mapping in chain(shown, told):
            at.update(mapping)
        return at, moved(chain(told, shown))

    def events(
        self, conversation: str, at: Mapping[str, int], removals: Mapping[str, list[int]]
    ) -> tuple[list[Event], int]:
        """What happened to a conversation; and how many removals nobody can place."""
        found, unplaced = [], 0
        for sent, acked, name, ids, replace_after, _ in self.appends:
            if name != conversation:
                continue
            for n, item_id in enumerate(ids):
                if item_id not in at:
                    assert acked is None, item_id
                    continue  # it never happened
                cut = Event(at[item_id], sent, acked or NEVER, item_id)
                if n == 0 and replace_after is not None:
                    cut = cut._replace(after=at[replace_after], before=at[item_id])
                found.append(cut)
        for sent, acked, name, kind, item_id, target, position in self.removes:
            if name != conversation:
                continue
            if kind == ERASE and position is None:
                unplaced += 1
                continue
            # Without an answer, Postgres tells whether and where it happened: at each of these places.
            for where in [position] if position else removals.get(item_id, []):
                covers = removal(kind, target, where)
                assert covers is not None
                found.append(Event(where, sent, acked or NEVER, None, *covers, kind == ERASE))
        return sorted({event.position: event for event in sorted(found, key=_certain)}.values()), unplaced


def _certain(event: Event) -> float:
    return -event.acked


class Attack:
    """The processes at work."""

    def __init__(self, settings: Settings, commands: Commands, directory: Path, *, erasing: bool) -> None:
        self.settings = settings
        self.children: list[Command] = []
        self.paths = [directory / f"{name}.jsonl" for name in NAMES]
        for _ in range(2):
            commands.flusher(settings)
        for name in NAMES:
            how = ["erasing"] if erasing else []
            self.children.append(
                commands.start(
                    settings, "-m", "tests.support.view_process", name, str(directory / f"{name}.jsonl"), *how
                )
            )

    async def working(self) -> None:
        """Return once all processes are at work."""

        def all_working() -> bool:
            for child in self.children:
                assert child.exit_code is None, child.text
            return all(path.exists() and path.stat().st_size for path in self.paths)

        await eventually(all_working, seconds=40)

    async def stop(self) -> Histories:
        """Let every client settle its last call; what they wrote down."""
        for child in self.children:
            child.send(signal.SIGTERM)
        await eventually(lambda: all(child.exit_code is not None for child in self.children), seconds=40)
        for child in self.children:
            assert child.exit_code == 0, child.text
        return Histories(self.paths)


async def _evict(settings: Settings) -> None:
    """Delete a part of all views, over and over."""
    async with Redis.from_url(settings.redis_url, protocol=2) as redis:
        while True:
            if keys := await redis.keys(f"{settings.key_prefix}:*:view:*"):
                await redis.delete(*random.sample(keys, random.randint(1, len(keys))))
            await asyncio.sleep(random.uniform(0, 0.2))


async def _violations(settings: Settings, histories: Histories) -> list[str]:
    """Everything that was seen and cannot have been, once all is flushed."""
    found = list(histories.wrong)
    postgres = await asyncpg.connect(settings.postgres_url)
    stored: dict[str, dict[str, int]] = defaultdict(dict)
    live: dict[str, list[tuple[str, int]]] = defaultdict(list)
    for name, item_id, position, gone in await postgres.fetch(
        "select conversation, item_id, position, data is null from buffer.items order by position"
    ):
        stored[name][item_id] = position
        if not gone:
            live[name].append((item_id, position))
    removals: dict[str, dict[str, list[int]]] = defaultdict(lambda: defaultdict(list))
    for name, item_id, position in await postgres.fetch(
        "select conversation, item_id, position from buffer.removals where item_id is not null"
    ):
        removals[name][item_id].append(position)
    found += [str(dict(row)) for row in await postgres.fetch("select * from buffer.dead_letters")]
    await postgres.close()
    async with Buffer.connect(settings) as buffer:
        await on_path(buffer, "stream")
        for name in sorted(histories.reads):
            at, elsewhere = histories.positions(name, stored[name])
            events, unplaced = histories.events(name, at, removals[name])
            if unplaced:
                found.append(f"{name}: {unplaced} erasures ended without an answer")
                continue
            found += [f"{name}: {what}" for what in elsewhere + faults(events, histories.reads[name])]
            if list(states(events)[-1]) != live[name]:
                found.append(f"{name}: Postgres holds {live[name]}, and it should be {states(events)[-1]}")
            for _ in range(2):
                read = await buffer.conversation(name).context(1_000)
                if not read.complete or [(item.id, item.position) for item in read.items] != live[name]:
                    found.append(f"{name}: a last read gave {read}, and Postgres holds {live[name]}")
    return found


@asynccontextmanager
async def _attacked(
    settings: Settings, commands: Commands, directory: Path, *, erasing: bool, evicting: bool = True
) -> AsyncIterator[Attack]:
    attack = Attack(settings, commands, directory, erasing=erasing)
    await attack.working()
    evictions = asyncio.create_task(_evict(settings)) if evicting else None
    try:
        yield attack
    finally:
        if evictions is not None:
            evictions.cancel()
            await asyncio.wait([evictions])


async def _judge(attack: Attack) -> Histories:
    histories = await attack.stop()
    reads = sum(map(len, histories.reads.values()))
    _log.info(
        "%d appends, %d removals, %d reads, %s; %d refused",
        len(histories.appends),
        len(histories.removes),
        reads,
        dict(histories.served),
        len(histories.unread),
    )
    async with Buffer.connect(attack.settings) as buffer:
        await on_path(buffer, "stream")
        await buffer.flush()
    found = await _violations(attack.settings, histories)
    assert not found, f"{len(found)} of {reads}: " + "\n".join(found[:5])
    assert reads > 50 * SECONDS
    served = histories.served
    assert served["hit"] + served["shared"] > 10 * SECONDS, served
    assert served["miss"] > 20
    return histories


async def test_every_read_is_one_state_while_views_are_filled_moved_and_evicted(
    settings: Settings, commands: Commands, tmp_path: Path
) -> None:
    """Appends, batches, replacements, pops, deletions, erasures; no read is late, torn, doubled or empty."""
    tiny = settings.model_copy(update=TINY)
    async with _attacked(tiny, commands, tmp_path, erasing=True) as attack:
        await asyncio.sleep(SECONDS)
        histories = await _judge(attack)
    assert not histories.unread


@pytest.mark.parametrize("how", ["killed", "older"])
async def test_every_read_is_one_state_while_redis_dies_and_comes_back(
    own_servers: EmbeddedServers, own_settings: Settings, commands: Commands, tmp_path: Path, how: str
) -> None:
    """Killed and restarted with its file; or with an older one, and the views that it had then."""
    tiny = own_settings.model_copy(update=TINY | {"cache_ttls": {"conversation": 60.0}})
    redis = own_servers.redis
    async with _attacked(tiny, commands, tmp_path, erasing=False) as attack, Buffer.connect(tiny) as buffer:
        await asyncio.sleep(SECONDS / 3)
        files = redis.directory / "appendonlydir"
        copy = files.with_name("copy")
        if how == "older":
            shutil.copytree(files, copy)
            await asyncio.sleep(SECONDS / 3)
        await redis.kill()
        await eventually(lambda: modes(buffer) == {"direct"})
        if how == "older":
            shutil.rmtree(files)
            copy.rename(files)
        await redis.restart()
        await eventually(lambda: modes(buffer) == {"stream"})
        await asyncio.sleep(SECONDS / 3)
        await _judge(attack)


async def test_every_read_is_one_state_while_the_server_evicts_views_itself(
    commands: Commands, tmp_path: Path
) -> None:
    """A `maxmemory` with volatile-lru, now and then: views go as the server likes, and nothing else."""
    small = {"maxmemory-policy": "volatile-lru"}
    async with EmbeddedServers.start(redis_binary=REDIS_BINARY, redis_config=small) as servers:
        changes = TINY | {"cache_ttls": {"conversation": 60.0}, "high_water_memory_share": 1.0}
        settings = settings_for(servers, **changes)
        await migrate_database(settings)
        async with (
            Redis.from_url(settings.redis_url, protocol=2) as redis,
            _attacked(settings, commands, tmp_path, erasing=True, evicting=False) as attack,
        ):
            until = time.monotonic() + SECONDS
            while time.monotonic() < until:  # short enough that no process finds it crowded all the time
                used = (await redis.info("memory"))["used_memory"]
                await redis.config_set("maxmemory", used - 20_000)
                await asyncio.sleep(0.02)
                await redis.config_set("maxmemory", 0)
                await asyncio.sleep(0.2)
            histories = await _judge(attack)
            assert len(histories.appends) > 10 * SECONDS
            assert (await redis.info("stats"))["evicted_keys"] > 20
