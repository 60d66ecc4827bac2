"""What the managers of the path do in Redis: fences, grants, members, and what an older server still holds.

Over a link of the manager's own, so that its time limits are short, and its look at another server
disturbs nobody.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from buffer.stream import scripts
from buffer.stream.keys import ShardKeys, member_field
from buffer.stream.link import Command, Link, script_call
from buffer.stream.shards import RawEntry, checked


class Standing(NamedTuple):
    """What stands in a shard: the epoch of a grant, or a fence, or neither.

    ``mark`` and ``last`` are the flushed-through and the last sequence of that epoch.
    """

    epoch: int | None
    fence: str | None
    mark: int
    last: int


class Fence(NamedTuple):
    """A fence that stands: its text, the epoch whose grant it ended, and the entries behind it."""

    text: str
    ended: int | None
    entries: int


class Grants:
    """The grants of all shards of one Redis."""

    def __init__(self, link: Link, keys: Sequence[ShardKeys]) -> None:
        self._link = link
        self._keys = keys

    @property
    def run_id(self) -> str:
        """The run id of the server that answered last."""
        return self._link.run_id

    async def _call(self, *commands: Command) -> list[Any]:
        return [checked(reply) for reply in await self._link.round_trip(commands)]

    async def probe(self, shards: Sequence[int]) -> list[Standing]:
        """What stands in each shard.

        Raises:
            RedisUnavailable: no answer, or the server takes no writes.
        """
        replies = await self._call(
            *(script_call(scripts.PROBE, (self._keys[s].stream, self._keys[s].shard), ()) for s in shards)
        )
        return [
            Standing(
                int(epoch) if epoch else None,
                fence.decode() if fence else None,
                int(mark),
                int(mark) + entries,
            )
            for epoch, fence, mark, entries in replies
        ]

    async def fence(self, shard: int, epoch: int, nonce: str) -> Fence:
        """End any grant of an older epoch, and put a fence in its place.

        Raises:
            Refused: a newer epoch was granted.
        """
        keys = self._keys[shard]
        (reply,) = await self._call(
            script_call(scripts.FENCE, (keys.stream, keys.shard), (b"%d" % epoch, nonce.encode()))
        )
        text = reply[0].decode()
        ended = text.rpartition("/")[2]
        return Fence(text, int(ended) if ended else None, reply[1])

    async def grant(
        self, shard: int, epoch: int, fence: str, members: Sequence[str], managers: Sequence[str]
    ) -> bool:
        """Empty the shard and open it for an epoch; False if that fence does not stand."""
        keys = self._keys[shard]
        fields = [member_field(process) for process in members]
        (reply,) = await self._call(
            script_call(
                scripts.GRANT,
                (keys.stream, keys.shard, keys.ids, keys.ids_old, keys.leases, keys.fills, keys.managers),
                (
                    b"%d" % epoch,
                    fence.encode(),
                    b"%d" % len(fields),
                    *fields,
                    *(manager.encode() for manager in managers),
                ),
            )
        )
        return bool(reply == b"%d" % epoch)

    async def kick(self, shard: int, epoch: int, process: str) -> int:
        """Put a process out of the grant; the last sequence that was given out so far, -1 for none."""
        keys = self._keys[shard]
        (reply,) = await self._call(
            script_call(scripts.KICK, (keys.stream, keys.shard), (b"%d" % epoch, member_field(process)))
        )
        return int(reply)

    async def report(self, epochs: dict[int, int], manager: str, questions: dict[int, int]) -> dict[int, int]:
        """Answer each shard's questions up to a number; 0 makes the manager known. How many there are."""
        calls = []
        for shard, epoch in epochs.items():
            keys = self._keys[shard]
            answered = b"%d" % questions.get(shard, 0)
            calls.append(
                script_call(
                    scripts.REPORT, (keys.shard, keys.managers), (b"%d" % epoch, manager.encode(), answered)
                )
            )
        return dict(zip(epochs, map(int, await self._call(*calls)), strict=True))

    async def dismiss(self, shards: Sequence[int], manager: str) -> None:
        """Forget a manager that Postgres has forgotten."""
        await self._call(*((b"HDEL", self._keys[s].managers, manager.encode()) for s in shards))

    async def entries(self, shard: int, epoch: int, after: int, count: int) -> list[RawEntry]:
        """Up to ``count`` entries of an epoch after a sequence, oldest first."""
        start = b"(%d-%d" % (epoch, after) if after >= 0 else b"%d" % epoch
        (reply,) = await self._call(
            (b"XRANGE", self._keys[shard].stream, start, b"%d" % epoch, b"COUNT", b"%d" % count)
        )
        return [(entry_id, fields[1], fields[3]) for entry_id, fields in reply]

    async def close(self) -> None:
        """Drop the connection."""
        await self._link.close()
