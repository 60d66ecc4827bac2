"""A shard's stream as it grows, over a connection of its own: a blocking read holds up whoever shares one.

It reads with XREAD, outside of the consumer group. What it brings may be shown only under the rules of
`buffer.path`: the caller looks at the path after every reply.
"""

from __future__ import annotations

from typing import Any

from redis.exceptions import NoScriptError

from buffer.stream import scripts
from buffer.stream.keys import ShardKeys
from buffer.stream.link import Link, script_call
from buffer.stream.shards import RawEntry, checked

# Also the time after which a connection that is dead without a sign is noticed, with the link's own limit.
_BLOCK_SECONDS = 2.0
# An item may have 1 MiB.
_MOST_ENTRIES = 100


class Feed:
    """The entries of one shard from some moment on."""

    def __init__(self, link: Link, keys: ShardKeys, member: bytes) -> None:
        self._link = link
        self._keys = keys
        self._member = member

    async def start(self, epoch: int) -> int:
        """The last sequence that was given out in this epoch so far, or -1; `read` goes on after it.

        Raises:
            Refused: Redis does not hold the grant of this epoch, or this process is no member.
            LinkLost: the round trip failed.
        """
        call = script_call(
            scripts.FOLLOW, (self._keys.stream, self._keys.shard), (b"%d" % epoch, self._member)
        )
        (reply,) = await self._link.round_trip([call])
        if isinstance(reply, NoScriptError):
            (reply,) = await self._link.round_trip([call])
        return int(checked(reply))

    async def read(self, epoch: int, after: int) -> list[RawEntry]:
        """Entries after a sequence, oldest first, once there are any; none if it took too long.

        Raises:
            LinkLost: the connection broke, or was silent for too long.
        """
        # -1 stands before the first entry of the epoch, whose number is 0.
        last = b"%d-%d" % (epoch, after) if after >= 0 else b"%d-%d" % (epoch - 1, (1 << 64) - 1)
        block = b"%d" % (_BLOCK_SECONDS * 1000)
        await self._link.send(
            [
                (
                    b"XREAD",
                    b"COUNT",
                    b"%d" % _MOST_ENTRIES,
                    b"BLOCK",
                    block,
                    b"STREAMS",
                    self._keys.stream,
                    last,
                )
            ]
        )
        reply: Any = checked(await self._link.receive(_BLOCK_SECONDS))
        if not reply:
            return []
        ((_, entries),) = reply
        # Without our two fields it is nobody's, and its header one of no version.
        return [
            (entry_id, *(fields[1::2] if len(fields) == 4 else (b"", b""))) for entry_id, fields in entries
        ]

    def retry_delay(self) -> float:
        """Seconds to wait before `start` is tried again."""
        return self._link.retry_delay()

    def abort(self) -> None:
        """Drop the connection at once: whoever reads gets `LinkLost`."""
        self._link.abort()

    async def close(self) -> None:
        """Drop the connection."""
        await self._link.close()
