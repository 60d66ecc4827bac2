"""Reads one shard's stream as it grows, for all listeners of this process; see the package for the rules."""

from __future__ import annotations

import asyncio
import logging
import random

import anyio

from buffer.errors import BufferError
from buffer.events.subscription import Subscription
from buffer.model.position import pack
from buffer.model.record import FORMAT_VERSION, decode_entry
from buffer.path.member import Member
from buffer.stream.feed import Feed
from buffer.stream.shards import RawEntry, Refused

_log = logging.getLogger(__name__)

_VERSION = FORMAT_VERSION.encode()
# The path is looked at so often while it is not the stream; a change of it is told.
_WAIT_SECONDS = 0.1
# After a break all listeners read the history: one that follows a gap at once could make the next one.
_AGAIN_SECONDS = 0.05


class _Gap(BufferError):
    """Something was not seen: flushed and trimmed already, of another epoch, or of a newer release."""


class Follower:
    """The follower of one shard; it runs while there are subscriptions."""

    def __init__(self, shard: int, feed: Feed, member: Member) -> None:
        self._shard = shard
        self._feed = feed
        self._member = member
        self._subscriptions: dict[bytes, list[Subscription]] = {}
        self._live = False
        self._epoch: int | None = None  # in which the stream is read
        self._changed = asyncio.Event()
        self._scope = anyio.CancelScope()

    @property
    def idle(self) -> bool:
        """Whether nobody listens."""
        return not self._subscriptions

    def add(self, subscription: Subscription) -> None:
        """Hand entries to a listener, from the next one on, or from when the stream is followed."""
        self._subscriptions.setdefault(subscription.key, []).append(subscription)
        if self._live:
            subscription.start()

    def remove(self, subscription: Subscription) -> None:
        """Hand nothing more to a listener."""
        same = self._subscriptions.get(subscription.key, [])
        if subscription in same:
            same.remove(subscription)
            if not same:
                del self._subscriptions[subscription.key]

    def path_changed(self) -> None:
        """Look at the path at once, also in the middle of a blocking read."""
        self._changed.set()
        if self._epoch is not None and not self._member.states[self._shard].at(self._epoch, "stream"):
            self._feed.abort()

    def stop(self) -> None:
        """Ask `run` to return."""
        self._scope.cancel()

    async def run(self) -> None:
        """Follow until `stop`."""
        with self._scope:
            try:
                while True:
                    await self._follow_once()
            finally:
                self._break_off(everybody=True)
                with anyio.CancelScope(shield=True):
                    await self._feed.close()

    async def _follow_once(self) -> None:
        epoch = await self._stream_epoch()
        self._epoch = epoch
        try:
            await self._follow(epoch)
        except _Gap as error:
            _log.debug("shard %d: %s", self._shard, error)
        except Refused:
            self._member.refused(self._shard, epoch)
        except BufferError as error:
            _log.debug("shard %d is not followed: %s", self._shard, error)
            self._member.suspect()
        finally:
            self._epoch = None
            self._break_off()
        await asyncio.sleep(random.uniform(0, _AGAIN_SECONDS) + self._feed.retry_delay())

    async def _stream_epoch(self) -> int:
        """The epoch of the path, once it is the stream and this process may show what is there."""
        while True:
            state = self._member.states[self._shard]
            if state.mode == "stream" and self._member.permitted():
                return state.epoch
            self._changed.clear()
            with anyio.move_on_after(_WAIT_SECONDS):
                await self._changed.wait()

    async def _follow(self, epoch: int) -> None:
        seen = await self._feed.start(epoch)
        if not self._member.may_show(self._shard, epoch, "stream"):
            return
        self._live = True
        for subscription in self._everybody():
            subscription.start()
        while True:
            entries = await self._feed.read(epoch, seen)
            if not self._member.may_show(self._shard, epoch, "stream"):
                return
            for entry in entries:
                seen = self._next(epoch, seen, entry)
                self._tell(epoch, seen, entry)

    def _next(self, epoch: int, seen: int, entry: RawEntry) -> int:
        """The entry's number, which must be the next one."""
        of_epoch, _, number = entry[0].partition(b"-")
        if int(of_epoch) != epoch or int(number) != seen + 1:
            raise _Gap(f"after number {seen} of epoch {epoch} comes {entry[0].decode()}")
        return seen + 1

    def _tell(self, epoch: int, sequence: int, entry: RawEntry) -> None:
        # A shard has many conversations, and few of them have listeners: only theirs are decoded.
        version, _, tenant, conversation, *_ = (*entry[1].split(b"/", 4), b"", b"", b"")
        if version != _VERSION:
            raise _Gap(f"a newer release wrote number {sequence}")
        listening = self._subscriptions.get(b"%b/%b" % (tenant, conversation))
        if not listening:
            return
        record = decode_entry(*entry)
        self._member.retention.keep_entries(self._shard, epoch, [entry])
        position = pack(epoch, sequence)
        for subscription in list(listening):
            subscription.put(position, record)
            if subscription.ended:
                self.remove(subscription)

    def _break_off(self, *, everybody: bool = False) -> None:
        """End those that have started: they may have missed something. The others go on waiting."""
        self._live = False
        for subscription in self._everybody():
            if subscription.started or everybody:
                subscription.end()
                self.remove(subscription)

    def _everybody(self) -> list[Subscription]:
        return [subscription for same in self._subscriptions.values() for subscription in same]
