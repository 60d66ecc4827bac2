"""One connection to one Redis node, used one round trip at a time, and calls that share it.

A `Link` sends many commands at once and reads their replies in order; it has a time limit of its own
around the whole round trip (per-command time-outs inside the driver cost 25 to 45 % of a small batch).
After any failure the connection is dropped: what was sent may or may not have run, and nobody must
ever read a reply that belongs to somebody else.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

import hiredis
from redis.asyncio.connection import AbstractConnection
from redis.exceptions import NoScriptError, RedisError, ResponseError

from buffer.errors import RedisUnavailable
from buffer.stream.scripts import Script

# A command is what goes over the wire, or a script call that is spelled out when the link sends it.
Command = tuple[Any, ...]

_RECONNECT_FIRST_SECONDS = 0.01
_RECONNECT_MOST_SECONDS = 0.5


class LinkLost(RedisUnavailable):
    """The round trip failed; ``sent`` says whether the commands may have run."""

    def __init__(self, message: str, *, sent: bool) -> None:
        super().__init__(message, retry_after=0.5)
        self.sent = sent


def script_call(script: Script, keys: Sequence[bytes], args: Sequence[bytes]) -> Command:
    """A call of ``script`` by its SHA; the link falls back to its text where Redis does not know it."""
    return (script, keys, args)


def _words(command: Command, *, full_text: bool = False) -> tuple[Any, ...]:
    head = command[0]
    if not isinstance(head, Script):
        return command
    _, keys, args = command
    verb = (b"EVAL", head.source) if full_text else (b"EVALSHA", head.sha)
    return (*verb, b"%d" % len(keys), *keys, *args)


class Link:
    """A connection and the discipline around it. Not safe for concurrent use: one owner, one task."""

    def __init__(self, make_connection: Callable[[], AbstractConnection], timeout_seconds: float) -> None:
        self._make_connection = make_connection
        self._timeout_seconds = timeout_seconds
        self._connection: AbstractConnection | None = None
        self._failures = 0

    async def round_trip(self, commands: Sequence[Command]) -> list[Any]:
        """Send all commands, return all replies; an error reply is returned as a `ResponseError`.

        Raises:
            LinkLost: no connection, or it broke or timed out on the way.
        """
        sent = False
        try:
            async with asyncio.timeout(self._timeout_seconds):
                connection = self._connection
                if connection is None or not connection.is_connected:
                    connection = await self._connect()
                sent = True
                replies = await self._exchange(connection, [_words(c) for c in commands])
                unknown = [i for i, reply in enumerate(replies) if isinstance(reply, NoScriptError)]
                if unknown:
                    again = [_words(commands[i], full_text=True) for i in unknown]
                    for i, reply in zip(unknown, await self._exchange(connection, again), strict=True):
                        replies[i] = reply
        except (RedisError, OSError, TimeoutError, EOFError) as error:
            await self.close()
            self._failures += 1
            raise LinkLost(f"Redis: {error or type(error).__name__}", sent=sent) from error
        except BaseException:
            await self.close()
            raise
        self._failures = 0
        return replies

    async def _connect(self) -> AbstractConnection:
        await self.close()
        connection = self._make_connection()
        await connection.connect()
        self._connection = connection
        return connection

    @staticmethod
    async def _exchange(connection: AbstractConnection, commands: list[tuple[Any, ...]]) -> list[Any]:
        packed = [hiredis.pack_command(words) for words in commands]
        await connection.send_packed_command(packed, check_health=False)
        replies: list[Any] = []
        for _ in commands:
            try:
                replies.append(await connection.read_response(disable_decoding=True))
            except ResponseError as error:
                replies.append(error)
        return replies

    def retry_delay(self) -> float:
        """Seconds to wait before the next attempt: exponential with full jitter, bounded."""
        most = min(_RECONNECT_MOST_SECONDS, _RECONNECT_FIRST_SECONDS * 2 ** min(self._failures, 10))
        return random.uniform(_RECONNECT_FIRST_SECONDS, max(_RECONNECT_FIRST_SECONDS, most))

    async def close(self) -> None:
        """Drop the connection; the next round trip makes a new one."""
        connection, self._connection = self._connection, None
        if connection is not None:
            await connection.disconnect(nowait=True)


class Calls:
    """Independent calls that share a link: those of one event-loop turn travel together."""

    def __init__(self, link: Link, most_waiting: int = 10_000) -> None:
        self._link = link
        self._most_waiting = most_waiting
        self._waiting: list[tuple[Sequence[Command], asyncio.Future[list[Any]]]] = []
        self._wakeup = asyncio.Event()

    def submit(self, commands: Sequence[Command]) -> Awaitable[list[Any]]:
        """The replies of these commands, in order; error replies are returned, not raised.

        Awaiting it raises `LinkLost` if the connection failed on the way.
        """
        if len(self._waiting) >= self._most_waiting:
            raise RedisUnavailable(f"{self._most_waiting} calls wait for Redis already", retry_after=0.5)
        future: asyncio.Future[list[Any]] = asyncio.get_running_loop().create_future()
        self._waiting.append((commands, future))
        self._wakeup.set()
        return future

    async def run(self) -> None:
        """Serve the calls until cancelled."""
        try:
            while True:
                await self._wakeup.wait()
                self._wakeup.clear()
                while self._waiting:
                    await self._serve()
        finally:
            for _, future in self._waiting:
                future.cancel()
            await self._link.close()

    async def _serve(self) -> None:
        batch, self._waiting = self._waiting, []
        batch = [(commands, future) for commands, future in batch if not future.done()]
        try:
            replies = await self._link.round_trip([c for commands, _ in batch for c in commands])
        except LinkLost as error:
            for _, future in batch:
                if not future.done():
                    future.set_exception(error)
            return
        except asyncio.CancelledError:
            for _, future in batch:
                future.cancel()
            raise
        at = 0
        for commands, future in batch:
            if not future.done():
                future.set_result(replies[at : at + len(commands)])
            at += len(commands)
