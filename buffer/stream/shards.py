"""Typed operations on the shards: what the scripts take and give, and what their error replies mean."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from redis.exceptions import (
    ClusterDownError,
    MasterDownError,
    MovedError,
    NoPermissionError,
    NoScriptError,
    OutOfMemoryError,
    ReadOnlyError,
    ResponseError,
)

from buffer.errors import BufferError, RedisUnavailable
from buffer.model.record import Record, UnknownRecordFormat, created_ms, decode_entry
from buffer.stream import scripts
from buffer.stream.keys import ShardKeys, channel, member_field
from buffer.stream.link import Calls, Command, script_call


class Refused(RedisUnavailable):
    """Redis does not hold the grant for the caller's epoch."""


class EntryMissing(RedisUnavailable):
    """Redis does not hold an unflushed entry any more: somebody took it out."""


class OutOfMemory(RedisUnavailable):
    """Redis is at its maxmemory, and ran nothing."""


class StreamCorrupt(BufferError):
    """Redis holds something that this release cannot have written."""


# Each passes by itself: a failover ends, memory is freed, replicas come back. Redis did not run the command.
_PASSING = (ReadOnlyError, ClusterDownError, MasterDownError, MovedError, NoScriptError)
_PASSING_PREFIXES = ("NOREPLICAS", "LOADING", "TRYAGAIN", "BUSY", "MISCONF", "UNBLOCKED")


def error_of(reply: ResponseError) -> BufferError:
    """What an error reply means to a caller: refused, passing, or a fault of ours."""
    text = str(reply)
    if "REFUSED" in text:
        return Refused(_refusal(text), retry_after=0.1)
    if text.startswith("MISSING"):
        return EntryMissing(f"Redis: {text}", retry_after=0.5)
    if isinstance(reply, OutOfMemoryError):
        return OutOfMemory("Redis is out of memory (maxmemory)", retry_after=1.0)
    if isinstance(reply, _PASSING) or text.startswith(_PASSING_PREFIXES):
        return RedisUnavailable(f"Redis: {text}", retry_after=0.5)
    if isinstance(reply, NoPermissionError):
        return RedisUnavailable(f"Redis refuses this user: {text}", retry_after=5.0)
    return StreamCorrupt(f"Redis: {text}")


def _refusal(text: str) -> str:
    if text.endswith("none"):
        return "Redis: the shard is not open in Redis"
    return f"Redis: {text}"


def checked(reply: Any) -> Any:
    """The reply, or the error that it stands for, raised."""
    if isinstance(reply, ResponseError):
        raise error_of(reply)
    return reply


# An entry as it stands in the stream: id, header, payload.
RawEntry = tuple[bytes, bytes, bytes]


@dataclass(slots=True, frozen=True)
class Backlog:
    """What waits in a shard. ``epoch`` is None where Redis holds no grant; ``oldest_ms`` is Unix time."""

    epoch: int | None
    mark: int
    turns: int
    bytes: int
    settled_bytes: int
    oldest_ms: int | None


class Tail(NamedTuple):
    """A conversation's unflushed records, in order; ``older`` is where to go on for those before, if any.

    ``entries`` are the same as they stand in the stream; ``mark`` is the shard's flushed-through sequence.
    """

    mark: int
    records: list[Record]
    entries: list[RawEntry]
    older: int | None


@dataclass(slots=True, frozen=True)
class Settlement:
    """Entries ``(before, after]`` of a shard, by conversation: what `Shards.settle` makes Redis forget.

    ``views`` tells for each conversation what becomes of its view: ``a`` appended to, ``n`` begun if there
    is none, ``x`` dropped.
    """

    before: int
    after: int
    nbytes: int
    conversations: list[bytes]
    views: bytes

    @property
    def view_bytes(self) -> int:
        """What views may take of Redis's memory for it: allocators round up, and each has a key."""
        return 2 * self.nbytes + 256 * len(self.conversations)


class ViewLimits(NamedTuple):
    """How long views live, and how much they hold; ``ttl_ms`` 0: those that are touched are dropped."""

    ttl_ms: int
    most_bytes: int
    most_items: int


class Shards:
    """The shards of one Redis, over shared calls."""

    def __init__(
        self, calls: Calls, prefix: str, shards: int, process: str, *, settling: Calls | None = None
    ) -> None:
        self._calls = calls
        self._settling = settling or calls
        self.member = member_field(process)
        self.keys = [ShardKeys(prefix, shard) for shard in range(shards)]
        self._nudge = channel(prefix, "nudge")
        self._flushed = channel(prefix, "flushed")

    @property
    def channels(self) -> tuple[bytes, bytes]:
        """The pub/sub channels: (nudge, flushed)."""
        return self._nudge, self._flushed

    async def _call(self, *commands: Command) -> list[Any]:
        return [checked(reply) for reply in await self._calls.submit(commands)]

    async def join(self, epochs: Mapping[int, int]) -> None:
        """Become a member of the grants of these shards; it must be registered in Postgres before.

        Raises:
            Refused: a shard has no grant of that epoch.
        """
        await self._call(
            *(
                script_call(scripts.JOIN, (self.keys[shard].shard,), (b"%d" % epoch, self.member))
                for shard, epoch in epochs.items()
            )
        )

    async def ask(self, shard: int, epoch: int) -> tuple[int, int]:
        """Ask whether Postgres is away for all managers: this question's number, the last one answered."""
        keys = self.keys[shard]
        (reply,) = await self._call(
            script_call(scripts.ASK, (keys.shard, keys.managers), (b"%d" % epoch, self.member))
        )
        question, answered = reply
        return question, answered

    async def peek(self, shards: Sequence[int]) -> list[Backlog]:
        """The backlog of each shard, in one round trip."""
        replies = await self._call(
            *(script_call(scripts.PEEK, (self.keys[s].stream, self.keys[s].shard), ()) for s in shards)
        )
        return [
            Backlog(
                int(epoch) if epoch else None,
                int(mark),
                int(turns),
                int(nbytes),
                int(settled),
                created_ms(header),
            )
            for epoch, mark, nbytes, settled, turns, header in replies
        ]

    async def marks(self, shards: Sequence[int]) -> list[tuple[int, int]]:
        """(epoch, flushed-through sequence) of each shard; (0, -1) without a grant."""
        replies = await self._call(*((b"HMGET", self.keys[s].shard, b"epoch", b"mark") for s in shards))
        return [(int(epoch or 0), int(-1 if mark is None else mark)) for epoch, mark in replies]

    async def fetch(self, shard: int, epoch: int, after: int, count: int) -> list[RawEntry]:
        """Up to ``count`` raw entries (id, header, payload) after sequence ``after``, oldest first."""
        start = b"-" if after < 0 else b"(%d-%d" % (epoch, after)
        (reply,) = await self._call(
            (b"XRANGE", self.keys[shard].stream, start, b"+", b"COUNT", b"%d" % count)
        )
        return [(entry_id, fields[1], fields[3]) for entry_id, fields in reply]

    async def settle(self, shard: int, epoch: int, steps: Sequence[Settlement], views: ViewLimits) -> int:
        """Move what Postgres has from the tails into the views, step by step in one round trip.

        The shard's mark afterwards.
        """
        keys = self.keys[shard]
        limits = [b"%d" % limit for limit in views]
        commands: list[Command] = []
        for step in steps:
            marks = (b"%d" % epoch, b"%d" % step.before, b"%d" % step.after, b"%d" % step.nbytes)
            view_keys = [keys.view(epoch, conversation) for conversation in step.conversations]
            become = step.views if views.ttl_ms else b"x" * len(step.views)
            commands.append(
                script_call(
                    scripts.SETTLE,
                    (keys.stream, keys.shard, keys.leases, keys.fills, *view_keys),
                    (*marks, *limits, become, *step.conversations),
                )
            )
        *_, mark = [checked(reply) for reply in await self._settling.submit(commands)]
        await self._call((b"PUBLISH", self._flushed, b"%d %d %d" % (shard, epoch, int(mark))))
        return int(mark)

    async def rotate(self, shard: int, epoch: int, window_seconds: float) -> bool:
        """Age the idempotency window, if it is time; whether it did."""
        keys = self.keys[shard]
        (reply,) = await self._call(
            script_call(
                scripts.ROTATE,
                (keys.stream, keys.shard, keys.ids, keys.ids_old, keys.leases, keys.fills),
                (b"%d" % epoch, b"%d" % window_seconds),
            )
        )
        return bool(reply)

    async def nudge(self, *shards: int) -> None:
        """Ask whoever flushes the shards not to wait for more."""
        await self._call(*((b"PUBLISH", self._nudge, b"%d" % shard) for shard in shards))

    async def lease(self, shard: int, epoch: int, conversation_key: str, token: bytes) -> bytes | None:
        """The token of the look-up lease: ``token``, or one that stands; None: something is unflushed."""
        keys = self.keys[shard]
        (reply,) = await self._call(
            script_call(
                scripts.LEASE,
                (keys.shard, keys.leases),
                (b"%d" % epoch, conversation_key.encode(), token, self.member),
            )
        )
        unflushed, lease = reply
        return None if unflushed else lease

    async def tail(
        self, shard: int, epoch: int, conversation_key: str, most: int, older: int | None = None
    ) -> Tail:
        """The newest ``most`` unflushed records, or the next older ones from ``Tail.older``."""
        keys = self.keys[shard]
        (reply,) = await self._call(
            script_call(
                scripts.TAIL,
                (keys.stream, keys.shard),
                (
                    b"%d" % epoch,
                    conversation_key.encode(),
                    b"%d" % most,
                    b"" if older is None else b"%d" % older,
                    self.member,
                ),
            )
        )
        mark, go_on, *newest_first = reply
        return tail_of(mark, go_on, newest_first)


def tail_of(mark: bytes, go_on: bytes, newest_first: Sequence[Any]) -> Tail:
    """The tail that a script's reply holds.

    Raises:
        RedisUnavailable: a newer release wrote to it.
    """
    if not newest_first:
        return Tail(int(mark), [], [], None)
    entries: list[RawEntry] = [(entry[0], entry[1], entry[2]) for entry in reversed(newest_first)]
    try:
        records = [decode_entry(*entry) for entry in entries]
    except UnknownRecordFormat as error:
        raise RedisUnavailable(f"a newer release wrote to this conversation: {error}") from error
    return Tail(int(mark), records, entries, int(go_on) if go_on else None)
