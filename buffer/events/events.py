"""Listeners, and the followers that they share."""

from __future__ import annotations

import asyncio
import logging
import random
from collections import deque
from collections.abc import AsyncGenerator, Callable

import anyio
from anyio.abc import TaskGroup, TaskStatus

from buffer.errors import SlowListener, Unavailable
from buffer.events.follower import Follower
from buffer.events.subscription import Subscription
from buffer.metrics import Metrics
from buffer.model.ids import conversation_key, shard_of
from buffer.model.types import Event
from buffer.path.member import Member
from buffer.read.history import History, event_of
from buffer.stream.feed import Feed

_log = logging.getLogger(__name__)

_PAGE = 100
# How often a listener looks into Postgres while the path is direct, and after a failure; with jitter.
_POLL_SECONDS = 0.25


class Events:
    """The listeners of this process."""

    def __init__(
        self,
        make_feed: Callable[[int], Feed],
        member: Member,
        history: History,
        metrics: Metrics,
        buffer_max: int,
    ) -> None:
        self.member = member
        self.history = history
        self.buffer_max = buffer_max
        self.closing = asyncio.Event()
        self._make_feed = make_feed
        self._metrics = metrics
        self._followers: dict[int, Follower] = {}
        self._tasks: TaskGroup | None = None
        member.on_change.append(self._path_changed)
        metrics["event_followers"].set_function(lambda: len(self._followers))

    async def run(self, *, task_status: TaskStatus[None] = anyio.TASK_STATUS_IGNORED) -> None:
        """Follow what is listened to until cancelled; then every listener comes to its end."""
        async with anyio.create_task_group() as self._tasks:
            task_status.started()
            try:
                await anyio.sleep_forever()
            finally:
                self.closing.set()

    async def listen(self, tenant: str, conversation: str, after: int | None) -> AsyncGenerator[Event, None]:
        """What happens in a conversation after a position, or from now on; ends when this process closes.

        Raises:
            SlowListener: events came faster than they were taken.
            Unavailable: from where on could not be found out.
        """
        last = await self.history.last_position(tenant, conversation) if after is None else after
        listener = _Listener(self, tenant, conversation, last)
        gauge = self._metrics["event_listeners"]
        gauge.inc()
        try:
            while (event := await listener.next()) is not None:
                yield event
        except SlowListener:
            self._metrics["slow_listeners_total"].inc()
            raise
        finally:
            gauge.dec()
            listener.leave()

    def subscribe(self, shard: int, key: bytes) -> Subscription:
        """Begin to follow a conversation."""
        subscription = Subscription(key, self.buffer_max)
        if self._tasks is None or self.closing.is_set():
            subscription.end()
            return subscription
        follower = self._followers.get(shard)
        if follower is None:
            follower = self._followers[shard] = Follower(shard, self._make_feed(shard), self.member)
            self._tasks.start_soon(follower.run, name=f"follow-{shard}")
        follower.add(subscription)
        return subscription

    def unsubscribe(self, shard: int, subscription: Subscription) -> None:
        """Stop following it; a shard that nobody listens to is not followed."""
        follower = self._followers.get(shard)
        if follower is None:
            return
        follower.remove(subscription)
        if follower.idle:
            del self._followers[shard]
            follower.stop()

    def _path_changed(self) -> None:
        for follower in self._followers.values():
            follower.path_changed()


class _Listener:
    """One listener's way through the history and over to what is live."""

    def __init__(self, events: Events, tenant: str, conversation: str, last: int) -> None:
        key = conversation_key(tenant, conversation)
        self._events = events
        self._of = (tenant, conversation)
        self._key = key.encode()
        self._shard = shard_of(key, len(events.member.states))
        self._last = last  # what was given to the consumer
        self._read_through = last
        self._page: deque[Event] = deque()
        self._subscription: Subscription | None = None
        self._live = False
        self._hurry = events.member.states[self._shard].mode == "direct"

    async def next(self) -> Event | None:
        """The next event; None when the process closes."""
        while not self._events.closing.is_set():
            event = await self._step()
            if event is not None:
                self._last = event.position
                return event
        return None

    def leave(self) -> None:
        """Stop listening."""
        subscription, self._subscription = self._subscription, None
        self._live = False
        if subscription is not None:
            self._events.unsubscribe(self._shard, subscription)

    async def _step(self) -> Event | None:
        if self._page:
            return self._page.popleft()
        if self._live and self._subscription is not None:
            return await self._take(self._subscription)
        await self._catch_up()
        return None

    async def _take(self, subscription: Subscription) -> Event | None:
        entry = await subscription.take()
        if entry is not None:
            position, record = entry
            if position <= self._read_through:
                return None
            self._read_through = position
            return event_of(position, record)
        self.leave()
        if subscription.overflowed:
            message = f"more than {self._events.buffer_max} events wait for this listener (events_buffer_max)"
            raise SlowListener(message, position=self._last)
        return None

    async def _catch_up(self) -> None:
        """Read what happened; if the subscription had started before, and nothing is left, go live."""
        if self._subscription is None or self._subscription.ended:
            self.leave()
            self._subscription = self._events.subscribe(self._shard, self._key)
        # Postgres alone is looked into as long as there is more, or when the stream is not to be had.
        started = await self._subscription.wait_until_started(0.0 if self._hurry else _jittered())
        self._hurry = False
        try:
            part = await self._events.history.after(*self._of, self._read_through, _PAGE)
        except Unavailable as error:
            _log.debug("events of %s are not read: %s", self._key.decode(), error)
            await self._pause()
            return
        self._page.extend(part.events)
        self._read_through = part.through
        self._hurry = part.more
        if not part.whole:
            await self._pause()
        elif started and not part.more and not self._subscription.ended:
            self._live = True

    async def _pause(self) -> None:
        with anyio.move_on_after(_jittered()):
            await self._events.closing.wait()


def _jittered() -> float:
    return _POLL_SECONDS * random.uniform(0.5, 1.5)
