"""Listeners to events that write down what they hear, and what it comes to."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import AsyncIterator, Iterable
from contextlib import aclosing, asynccontextmanager

from buffer import Buffer, Conversation, Event
from buffer.model.ids import conversation_key, shard_of
from tests.support.polling import eventually


class Heard:
    """What one listener heard so far; ``error`` is what ended it."""

    def __init__(self) -> None:
        self.events: list[Event] = []
        self.error: Exception | None = None
        self.ended = False

    @property
    def ids(self) -> list[str | None]:
        return [event.item_id for event in self.events]

    async def count(self, number: int, *, seconds: float = 15.0) -> list[Event]:
        """The events, once there are so many."""
        await eventually(lambda: len(self.events) >= number or self.error, seconds=seconds)
        assert self.error is None, self.error
        assert len(self.events) == number
        return self.events

    async def run(self, conversation: Conversation, after: int | None) -> None:
        try:
            async with aclosing(conversation.events(after)) as events:
                async for event in events:
                    self.events.append(event)
        except Exception as error:  # noqa: BLE001 - the test looks at it
            self.error = error
        self.ended = True


@asynccontextmanager
async def listening(conversation: Conversation, after: int | None = 0) -> AsyncIterator[Heard]:
    """A listener in a task of its own, which stops with the block."""
    heard = Heard()
    task = asyncio.create_task(heard.run(conversation, after))
    try:
        yield heard
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


async def rest(conversation: Conversation, after: int, last: int) -> list[Event]:
    """All events after one position and through another."""
    heard: list[Event] = []
    if after >= last:
        return heard
    async with asyncio.timeout(15), aclosing(conversation.events(after)) as events:
        async for event in events:
            heard.append(event)
            if event.position >= last:
                break
    return heard


def applied(events: Iterable[Event], before: Iterable[tuple[int, str]] = ()) -> list[str]:
    """The conversation's ids that a client has, who had some and heard these events."""
    items = dict(before)
    for event in events:
        if event.removed_after is not None:
            items = {p: i for p, i in items.items() if not event.removed_after < p < event.position}
        if event.type == "appended":
            assert event.item is not None
            items[event.position] = event.item.id
        elif event.item_id is not None:
            items = {p: i for p, i in items.items() if i != event.item_id}
    return [items[position] for position in sorted(items)]


async def all_live(buffer: Buffer, listeners: int) -> None:
    """Return once so many listeners hear what comes at once."""
    await eventually(lambda: len(subscriptions(buffer)) == listeners)
    await eventually(lambda: all(subscription.started for subscription in subscriptions(buffer)))


def subscriptions(buffer: Buffer) -> list:
    followers = buffer.runtime.events._followers.values()
    return [subscription for follower in followers for subscription in follower._everybody()]


def same_shard(buffer: Buffer, number: int) -> list[str]:
    """Names of conversations that live in one shard."""
    shards = buffer.settings.shards
    names = (f"c{n}" for n in itertools.count())
    return list(
        itertools.islice((c for c in names if not shard_of(conversation_key("default", c), shards)), number)
    )
