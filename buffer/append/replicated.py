"""Appends that are acked once replicas have them, too.

On a connection of their own, since WAIT holds up whatever is sent behind it, and speaks for what was
written on its own connection only. A batch that too few replicas confirm in time is sent again, which finds
its ids and waits once more, until its callers give up: then their outcome is unknown, and buffered.
"""

from __future__ import annotations

from buffer.append.coalescer import Call, Coalescer
from buffer.stream.link import Command

# One WAIT: short, so that a batch behind it is not late for its callers.
_WAIT_SECONDS = 0.2


class Replicated(Coalescer):
    """A coalescer whose acks mean that ``replicas`` replicas have confirmed."""

    def _commands(self, calls: list[Call]) -> list[Command]:
        # A repeat writes nothing, and WAIT would not wait: so something is always written before it.
        shard = calls[-1][0]
        write = (b"HINCRBY", self._keys[shard].shard, b"waits", b"1")
        wait = (b"WAIT", b"%d" % self._settings.replicated_min_replicas, b"%d" % (_WAIT_SECONDS * 1000))
        return [*super()._commands(calls), write, wait]

    async def _receive_replies(self, calls: list[Call]) -> None:
        replies = [await self._link.receive() for _ in range(len(calls))]
        written = await self._link.receive()
        confirmed = await self._link.receive(more_seconds=_WAIT_SECONDS)
        # WAIT gives its count also when its time is up.
        enough = (
            isinstance(written, int)
            and isinstance(confirmed, int)
            and confirmed >= self._settings.replicated_min_replicas
        )
        for reply in replies:
            if calls:  # else they were put back meanwhile
                self._deliver(*calls.pop(0), reply, replicated=enough)
