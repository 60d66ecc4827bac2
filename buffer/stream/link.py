"""One connection to one Redis node, and calls that share it.

A `Link` sends many commands at once and reads their replies in order, under time limits of its own. After
any failure the connection is dropped: what was sent may or may not have run, and nobody must
ever read a reply that belongs to somebody else.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from typing import Any

import hiredis
from redis.asyncio.connection import AbstractConnection
from redis.exceptions import NoScriptError, RedisError, ResponseError

from buffer.errors import RedisUnavailable
from buffer.policy.backoff import full_jitter
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


class WrongServer(LinkLost):
    """Another server incarnation answers than the one that holds the grant; nothing was sent."""


def script_call(script: Script, keys: Sequence[bytes], args: Sequence[bytes]) -> Command:
    """A call of ``script``; the link sends its text once a connection, and its SHA from then on."""
    return (script, keys, args)


class Link:
    """A connection and the discipline around it: batches of commands go out and come back in order.

    One task may send while another one receives; two senders or two receivers at a time may not be.

    ``expected`` tells the run id that the server must have, or None for any. A server that restarted, or
    a replica that was promoted, has another one, and may have lost what the one before had acked.
    """

    def __init__(
        self,
        make_connection: Callable[[], AbstractConnection],
        timeout_seconds: float,
        expected: Callable[[], str | None] = lambda: None,
    ) -> None:
        self._make_connection = make_connection
        self._timeout_seconds = timeout_seconds
        self._expected = expected
        self._connection: AbstractConnection | None = None
        self.run_id = ""
        self._loaded: set[bytes] = set()
        self._failures = 0

    @property
    def connected(self) -> bool:
        """Whether there is a connection, as far as is known."""
        connection = self._connection
        return connection is not None and connection.is_connected and not _writer(connection).is_closing()

    async def round_trip(self, commands: Sequence[Command]) -> list[Any]:
        """Send all commands, return all replies; an error reply is returned as a `ResponseError`.

        Raises:
            LinkLost: no connection, or it broke or timed out on the way.
        """
        await self.send(commands)
        return [await self.receive() for _ in commands]

    async def send(self, commands: Sequence[Command]) -> None:
        """Put the commands on the wire, connecting if need be.

        Raises:
            LinkLost: ``sent`` is False if no connection could be made.
            WrongServer: it was, and leads to another server than the expected one.
        """
        sent = False
        try:
            async with asyncio.timeout(self._timeout_seconds):
                # Checked in the event-loop turn of the write: `writelines` on a transport that is gone leaves
                # its number in the selector, for whichever socket gets it next (CPython 3.12, 3.13).
                connection = self._connection
                if connection is None or not self.connected:
                    connection = await self._connect()
                await self._check_server()
                packed = [hiredis.pack_command(self._words(command)) for command in commands]
                sent = True
                await connection.send_packed_command(packed, check_health=False)
        except LinkLost:
            self._failures += 1
            raise
        except (RedisError, OSError, TimeoutError, EOFError) as error:
            raise await self._lost(self._connection, error, sent=sent) from error
        except BaseException:
            await self.close()
            raise

    async def receive(self, more_seconds: float = 0.0) -> Any:
        """The next reply; an error reply is returned as a `ResponseError`.

        ``more_seconds``: for how long the command itself waits.

        Raises:
            LinkLost: the connection broke or was silent for too long.
        """
        connection = self._connection
        if connection is None:
            raise LinkLost("Redis: the connection is gone", sent=True)
        try:
            async with asyncio.timeout(self._timeout_seconds + more_seconds):
                reply = await connection.read_response(disable_decoding=True)
        except NoScriptError as error:
            self._loaded.clear()  # somebody flushed the scripts; the next call brings the text along
            return error
        except ResponseError as error:
            return error
        except (RedisError, OSError, TimeoutError, EOFError) as error:
            raise await self._lost(connection, error, sent=True) from error
        except BaseException:
            await self.close()
            raise
        self._failures = 0
        return reply

    async def _check_server(self) -> None:
        expected = self._expected()
        if expected is not None and expected != self.run_id:
            await self.close()  # the next connection may lead to the right one
            raise WrongServer("Redis: this server does not hold the grant", sent=False)

    def _words(self, command: Command) -> tuple[Any, ...]:
        script = command[0]
        if not isinstance(script, Script):
            return command
        _, keys, args = command
        if script.sha in self._loaded:
            return (b"EVALSHA", script.sha, b"%d" % len(keys), *keys, *args)
        self._loaded.add(script.sha)
        return (b"EVAL", script.source, b"%d" % len(keys), *keys, *args)

    async def _connect(self) -> AbstractConnection:
        await self.close()
        connection = self._make_connection()
        try:
            await connection.connect()  # type: ignore[no-untyped-call]
            await connection.send_command("INFO", "server")
            info = await connection.read_response(disable_decoding=True)
        except BaseException:
            await connection.disconnect(nowait=True)
            raise
        self.run_id = _run_id(info)
        self._connection = connection
        return connection

    async def _lost(
        self, connection: AbstractConnection | None, error: BaseException, *, sent: bool
    ) -> LinkLost:
        if connection is self._connection:  # else the other direction has moved on to a new one
            await self.close()
        self._failures += 1
        return LinkLost(f"Redis: {error or type(error).__name__}", sent=sent)

    def retry_delay(self) -> float:
        """Seconds to wait before the next attempt: exponential with full jitter, bounded."""
        return full_jitter(self._failures, _RECONNECT_FIRST_SECONDS, _RECONNECT_MOST_SECONDS)

    def abort(self) -> None:
        """Drop the connection at once: whoever waits for a reply gets `LinkLost`."""
        if self._connection is not None and self._connection.is_connected:
            _writer(self._connection).transport.abort()

    async def close(self) -> None:
        """Drop the connection; the next send makes a new one."""
        connection, self._connection = self._connection, None
        self._loaded.clear()
        if connection is not None:
            await connection.disconnect(nowait=True)


def _writer(connection: AbstractConnection) -> asyncio.StreamWriter:
    """The stream below the driver, which does not say whether it is closing."""
    return connection._writer  # type: ignore[return-value]  # noqa: SLF001


def _run_id(info: bytes) -> str:
    for line in info.splitlines():
        if line.startswith(b"run_id:"):
            return line[7:].decode()
    raise RedisError("INFO does not tell the server's run_id")


_Waiting = list[tuple[Sequence[Command], "asyncio.Future[list[Any]]"]]


class Calls:
    """Independent calls that share a link: those of one event-loop turn travel together."""

    def __init__(self, link: Link, most_waiting: int = 10_000) -> None:
        self._link = link
        self._most_waiting = most_waiting
        self._waiting: _Waiting = []
        self._wakeup = asyncio.Event()
        self._busy = False
        self._closed = False

    async def call(self, commands: Sequence[Command]) -> list[Any]:
        """The replies of these commands: at once where nobody else is waiting, else as `submit` does.

        Whoever gives up on the way takes the connection along: the next call makes a new one.
        """
        if self._busy or self._waiting or self._closed:
            return await self.submit(commands)
        self._busy = True
        try:
            return await self._round_trip(commands)
        finally:
            self._busy = False
            if self._waiting:
                self._wakeup.set()

    def submit(self, commands: Sequence[Command]) -> asyncio.Future[list[Any]]:
        """The replies of these commands, in order; error replies are returned, not raised.

        Awaiting it raises `LinkLost` if the connection failed on the way.
        """
        if self._closed:
            raise RedisUnavailable("this process is closing")
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
                while self._waiting and not self._busy:
                    self._busy = True
                    try:
                        await self._serve()
                    finally:
                        self._busy = False
        finally:
            self._closed = True
            _fail(self._waiting, RedisUnavailable("this process is closing"))
            await self._link.close()

    async def _serve(self) -> None:
        batch, self._waiting = self._waiting, []
        batch = [(commands, future) for commands, future in batch if not future.done()]
        try:
            replies = await self._round_trip([c for commands, _ in batch for c in commands])
        except LinkLost as error:
            _fail(batch, error)
            return
        except asyncio.CancelledError:
            _fail(batch, RedisUnavailable("this process is closing"))
            raise
        at = 0
        for commands, future in batch:
            if not future.done():
                future.set_result(replies[at : at + len(commands)])
            at += len(commands)

    async def _round_trip(self, commands: Sequence[Command]) -> list[Any]:
        """All replies; a script that Redis had forgotten has not run, and is called once more."""
        replies = await self._link.round_trip(commands)
        unknown = [i for i, reply in enumerate(replies) if isinstance(reply, NoScriptError)]
        if unknown:
            again = await self._link.round_trip([commands[i] for i in unknown])
            for i, reply in zip(unknown, again, strict=True):
                replies[i] = reply
        return replies


def _fail(calls: _Waiting, error: RedisUnavailable) -> None:
    for _, future in calls:
        if not future.done():
            future.set_exception(error)
