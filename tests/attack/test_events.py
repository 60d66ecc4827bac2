"""Listeners while several processes append, everything is flushed within milliseconds, and Redis is lost."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, aclosing, asynccontextmanager

import pytest

from buffer import Buffer, Conversation, Event, Settings
from buffer.embedded import EmbeddedServers
from tests.support.listeners import Heard, listening, rest
from tests.support.polling import eventually
from tests.support.processes import Commands
from tests.support.writer_process import SHARED
from tests.support.writers import Writers, running, settled

pytestmark = pytest.mark.attack

_log = logging.getLogger(__name__)

PROCESSES = ("one", "two")
OWN = [f"own-{process}-{client}" for process in PROCESSES for client in range(8)]
FOLLOWED = [*OWN, *(f"shared-{number}" for number in range(SHARED))]
MORE_ACKS = 250
RESTLESS_EVENTS = 7


@asynccontextmanager
async def restless(conversation: Conversation) -> AsyncIterator[Heard]:
    """A listener that leaves after a few events, again and again, and resumes where it was."""
    heard = Heard()

    async def run() -> None:
        while True:
            after = heard.events[-1].position if heard.events else 0
            async with aclosing(conversation.events(after)) as events:
                for _ in range(RESTLESS_EVENTS):
                    heard.events.append(await anext(events))

    task = asyncio.create_task(run())
    try:
        yield heard
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


@pytest.mark.parametrize("how", ["killed", "wiped"])
async def test_every_listener_hears_the_final_order_whatever_happens_to_redis(
    own_servers: EmbeddedServers, own_settings: Settings, commands: Commands, how: str
) -> None:
    """Two processes append, Redis dies and comes back: each of 20 conversations is heard whole, in order."""
    settings = own_settings.model_copy(update={"flush_interval_seconds": 0.01, "redis_lost_seconds": 0.7})
    async with running(commands, settings, PROCESSES, flushers=1) as (writers, buffer):
        async with AsyncExitStack() as stack:
            heard: list[tuple[str, Heard]] = []
            for number, name in enumerate(FOLLOWED):
                conversation = buffer.conversation(name)
                listener = restless(conversation) if number % 4 == 3 else listening(conversation)
                heard.append((name, await stack.enter_async_context(listener)))
                late = listening(conversation, None)
                heard.append((name, await stack.enter_async_context(late)))
            await asyncio.gather(*(eventually(lambda one=one: one.events) for _, one in heard))
            await _more(writers)
            await own_servers.redis.kill()
            await writers.acking("direct")
            if how == "wiped":
                own_servers.redis.wipe()
            await own_servers.redis.restart()
            await writers.acking("stream")
            await _more(writers)
            await writers.stop()
            await settled(buffer)
            faults = [fault for name, one in heard if (fault := await _fault(buffer, name, one))]
            assert not faults, faults[:3]
        total = sum(len(one.events) for _, one in heard)
        _log.info("%s: %d events, %s", how, total, writers.summary())
        await _resume_everywhere(buffer, FOLLOWED[-1])


async def _more(writers: Writers) -> None:
    """Return once there were so many more acks."""
    began = time.monotonic()
    await eventually(lambda: len(writers.acks(since=began)) >= MORE_ACKS)


async def _order(buffer: Buffer, name: str) -> list[tuple[int, str]]:
    """What is there in the end."""
    items = []
    page = await buffer.conversation(name).items(limit=1_000)
    items += page.items
    while page.has_more:
        page = await buffer.conversation(name).items(after=page.last_id, limit=1_000)
        items += page.items
    return [(item.position, item.id) for item in items]


async def _fault(buffer: Buffer, name: str, heard: Heard) -> str | None:
    """What is wrong with what was heard, if anything."""
    final = await _order(buffer, name)
    await eventually(lambda: heard.error or heard.events[-1].position == final[-1][0])
    told = [(event.position, event.item_id) for event in heard.events]
    expected = [one for one in final if one[0] >= told[0][0]]
    if heard.error is None and told == expected:
        return None
    differ = next((pair for pair in zip(told, expected, strict=False) if pair[0] != pair[1]), None)
    return f"{name}: {heard.error}, {len(told)} events of {len(expected)}, first to differ {differ}"


async def _resume_everywhere(buffer: Buffer, name: str) -> None:
    """After any position, the rest of the final order."""
    final = await _order(buffer, name)
    for at in range(0, len(final), max(1, len(final) // 25)):
        events: list[Event] = await rest(buffer.conversation(name), final[at][0], final[-1][0])
        assert [(event.position, event.item_id) for event in events] == final[at + 1 :]
