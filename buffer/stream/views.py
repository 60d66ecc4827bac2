"""Views: what a conversation's newest committed items and its summary look like in Redis, and how they move.

The view of a conversation is one string, ``buffer:{3}:view:<epoch>:<tenant>/<conversation>``, with a TTL::

    length front item item item ...   length: of the front, 8 digits
    front  whole n last n summary n first 000000,
    item   [epoch,number,"item id",Unix ms,{...}],1nk,

Each ``n`` is a length of 8 digits. The items together are a JSON array without its brackets, so that they are
read at once; the number after each item holds its length, and its count in the view (``k``, 6 digits): so
a script can walk from the newest one back. ``whole`` is 1 while the view begins with the conversation's first
item; ``first`` is that item, if it is short enough. ``last`` is the last position that a fill knew of,
removed items and removals included.

Whatever is settled enters the views that are there in the same step (``scripts/settle.lua``), so a view
holds the newest items up to the shard's flushed-through mark, always: never one that the tail has as well.
Whoever fills one from Postgres holds a claim, which notes what was settled meanwhile. What comes beside the
stream, imports and dead letters, is noted in Postgres, see `buffer.store.stale_views`. A view lives in one
epoch of the path: another epoch has other keys.
"""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Sequence
from datetime import datetime
from typing import Any, NamedTuple

import msgspec

from buffer.errors import RedisUnavailable
from buffer.model.position import epoch_of, sequence_of
from buffer.model.types import Item, Summary
from buffer.stream import scripts
from buffer.stream.keys import ShardKeys, member_field
from buffer.stream.link import Calls, Command, script_call
from buffer.stream.shards import Tail, checked, tail_of

# A fill that takes longer is somebody else's to do again.
CLAIM_SECONDS = 3.0

_NUMBER = 8
# Views whose time to live this process remembers to have renewed; forgetting one costs one command.
_KEPT_ALIVE = 20_000
# The first item is kept at hand beside the newest ones, unless it is longer than this.
_FIRST_MOST_BYTES = 8 << 10


class ViewItem(NamedTuple):
    """An item on its way into a view; ``data`` is its JSON."""

    position: int
    item_id: str
    created_at: datetime
    data: bytes

    def encode(self) -> bytes:
        """The item as it stands in a view, without the number after it."""
        at, number = epoch_of(self.position), sequence_of(self.position)
        name = msgspec.json.encode(self.item_id)
        return b"[%d,%d,%b,%d,%b]" % (at, number, name, round(self.created_at.timestamp() * 1000), self.data)


class View(msgspec.Struct, frozen=True, gc=False):
    """A part of a view: its newest items, oldest first. ``older``: it holds more than were asked for."""

    whole: bool
    first_json: bytes
    last: int
    summary: Summary | None
    items: list[Item]
    older: bool

    @property
    def first(self) -> Item | None:
        """The conversation's first item, if it is at hand."""
        return Item.many([_loads(self.first_json)])[0] if self.first_json else None


def encode(
    items: Sequence[bytes],
    *,
    whole: bool,
    first: bytes | None,
    last: int,
    summary: Summary | None,
) -> bytes:
    """A view as Redis keeps it; items oldest first, each as `ViewItem.encode` gives it."""
    short = first is not None and len(first) <= _FIRST_MOST_BYTES
    texts = (
        b"%d" % last if last else b"",
        msgspec.json.encode(summary) if summary else b"",
        first if first and short else b"",
    )
    parts = [b"1" if whole else b"0"]
    for text in texts:
        parts += (b"%08d" % len(text), text)
    parts.append(b"000000,")
    front = b"".join(parts)
    counted = (b"%b,1%08d%06d," % (item, len(item), n) for n, item in enumerate(items, 1))
    return b"".join((b"%08d" % len(front), front, *counted))


def _loads(text: bytes) -> Any:
    try:
        return msgspec.json.decode(text)
    except (msgspec.DecodeError, UnicodeDecodeError):
        return json.loads(text)  # lone surrogates


def _decode(front: bytes, items: bytes, older: int) -> View:
    at, texts = 1, []
    for _ in range(3):
        length = int(front[at : at + _NUMBER])
        at += _NUMBER
        texts.append(front[at : at + length])
        at += length
    last, summary, first = texts
    return View(
        front[:1] == b"1",
        first,
        int(last or 0),
        msgspec.json.decode(summary, type=Summary) if summary else None,
        Item.many(_loads(b"[%b0]" % items)[:-1:2]),  # every other one is a length
        bool(older),
    )


class Views:
    """The views of all shards, over calls of their own: reads do not wait for what a flusher moves."""

    def __init__(self, calls: Calls, keys: Sequence[ShardKeys], process: str, ttl_seconds: float) -> None:
        self._calls = calls
        self._keys = keys
        self._member = member_field(process)
        self._ttl_seconds = ttl_seconds
        self._ttl_ms = b"%d" % (ttl_seconds * 1000)
        self._item_bytes = 1_000
        self._kept_alive: dict[bytes, float] = {}

    async def _call(self, script: scripts.Script, keys: Sequence[bytes], args: Sequence[bytes]) -> Any:
        (reply,) = await self._calls.call([script_call(script, keys, args)])
        return checked(reply)

    def _tell(self, command: Command) -> None:
        """Send a command for whose reply nobody waits."""
        with contextlib.suppress(RedisUnavailable):
            told = self._calls.submit([command])
            told.add_done_callback(lambda future: future.cancelled() or future.exception())

    async def read(
        self, shard: int, epoch: int, conversation: bytes, tail_most: int, view_most: int
    ) -> tuple[Tail, View | None]:
        """The newest unflushed entries and the newest items of the view, as one picture."""
        keys = self._keys[shard]
        view_key = keys.view(epoch, conversation)
        likely = b"%d" % (view_most * self._item_bytes)
        args = (b"%d" % epoch, conversation, b"%d" % tail_most, self._member, b"%d" % view_most, likely)
        mark, go_on, front, items, older, *entries = await self._call(
            scripts.READ, (keys.stream, keys.shard, view_key), args
        )
        view = _decode(front, items, older) if front else None
        if view is not None:
            self._keep_alive(view_key)
            if view.items:  # half as much again as of late
                self._item_bytes += (3 * len(items) // (2 * len(view.items)) - self._item_bytes) // 8
        return tail_of(mark, go_on, entries), view

    def _keep_alive(self, view_key: bytes) -> None:
        """Let a view live on from now, give or take a tenth.

        Nobody waits for it: the read itself changes nothing, and goes on where Redis takes no writes.
        """
        now = time.monotonic()
        if now - self._kept_alive.get(view_key, 0.0) < self._ttl_seconds / 10:
            return
        self._kept_alive.pop(view_key, None)
        self._kept_alive[view_key] = now
        if len(self._kept_alive) > _KEPT_ALIVE:
            del self._kept_alive[next(iter(self._kept_alive))]
        self._tell((b"PEXPIRE", view_key, self._ttl_ms))

    async def claim(self, shard: int, epoch: int, conversation: bytes, token: bytes) -> bool:
        """Take the right to fill a view; False if somebody else has it, or has used it."""
        keys = self._keys[shard]
        args = (b"%d" % epoch, conversation, token, b"%d" % (CLAIM_SECONDS * 1000), self._member)
        view_key = keys.view(epoch, conversation)
        return bool(await self._call(scripts.CLAIM, (keys.shard, keys.fills, view_key), args))

    async def fill(
        self, shard: int, epoch: int, conversation: bytes, token: bytes, flushed: int, view: bytes
    ) -> bool:
        """Put a view in place, read under a claim from a snapshot that has everything up to ``flushed``.

        False if it may be out of date by now.
        """
        keys = self._keys[shard]
        args = (b"%d" % epoch, conversation, token, b"%d" % flushed, view, self._ttl_ms)
        return bool(
            await self._call(scripts.FILL, (keys.shard, keys.fills, keys.view(epoch, conversation)), args)
        )

    def give_back(self, shard: int, epoch: int, conversation: bytes, token: bytes) -> None:
        """End a claim that is not used, so that the next reader need not wait for it."""
        keys = self._keys[shard]
        args = (b"%d" % epoch, conversation, token, b"-1", b"", b"1")
        self._tell(script_call(scripts.FILL, (keys.shard, keys.fills, keys.view(epoch, conversation)), args))

    async def sweep(self, cursor: int, count: int) -> tuple[int, int]:
        """Drop the views among about ``count`` keys: where to go on (0 at the end), how many they were."""
        ((at, found),) = await self._calls.submit(
            [(b"SCAN", b"%d" % cursor, b"MATCH", self._keys[0].all_views, b"COUNT", b"%d" % count)]
        )
        if found:
            (reply,) = await self._calls.submit([(b"UNLINK", *found)])
            return int(at), checked(reply)
        return int(at), 0

    async def drop(self, shard: int, epoch: int, conversations: Sequence[bytes]) -> None:
        """Drop views, and end the claims under which they would be filled from an older snapshot."""
        keys = self._keys[shard]
        replies = await self._calls.submit(
            [
                (b"HDEL", keys.fills, *conversations),
                (b"UNLINK", *(keys.view(epoch, conversation) for conversation in conversations)),
            ]
        )
        for reply in replies:
            checked(reply)
