"""A proxy that misbehaves on demand: between a client and Redis or Postgres, it can lose, cut and delay.

It listens on a loopback port and leads to a TCP address or a Unix socket.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from enum import Enum
from pathlib import Path

CHUNK = 1 << 16


class Fault(Enum):
    """What happens to a connection on which a matching request is seen."""

    CUT_REQUEST = "the request never reaches the server"
    CUT_AFTER_REQUEST = "the request reaches the server, and the connection is cut at once"
    CUT_BEFORE_REPLY = "the server answers, and the answer is lost with the connection"


class _Connection:
    def __init__(self, *writers: asyncio.StreamWriter) -> None:
        self.writers = writers
        self.cut_at_reply = False

    def cut(self) -> None:
        for writer in self.writers:
            writer.transport.abort()


class Proxy:
    """Use `proxied`. All faults may be changed while connections are open."""

    def __init__(self, upstream: Path | tuple[str, int]) -> None:
        self._upstream = upstream
        self._server: asyncio.Server | None = None
        self._connections: set[_Connection] = set()
        self._serving: set[asyncio.Task[None]] = set()
        self._requests_flow = asyncio.Event()
        self._replies_flow = asyncio.Event()
        self.resume()
        self._armed: tuple[Fault, bytes] | None = None
        self.delay_seconds = 0.0  # of every piece, each way
        self.refusing = False  # new connections are closed at once
        self.struck = asyncio.Event()  # the fault of `once` has happened

    @property
    def port(self) -> int:
        assert self._server is not None
        return int(self._server.sockets[0].getsockname()[1])

    def once(self, fault: Fault, match: bytes = b"") -> None:
        """Arm a fault for the next request that contains ``match``."""
        self._armed = (fault, match)
        self.struck.clear()

    def stall(self) -> None:
        """Keep connections open, and let nothing through either way."""
        self._requests_flow.clear()
        self._replies_flow.clear()

    def stall_replies(self) -> None:
        """Let requests through, and hold every answer back."""
        self._replies_flow.clear()

    def resume(self) -> None:
        """Let what was held back go on."""
        self._requests_flow.set()
        self._replies_flow.set()

    def cut_all(self) -> None:
        """Reset every open connection."""
        for connection in self._connections:
            connection.cut()

    async def start(self) -> None:
        self._server = await asyncio.start_server(self._accept, "127.0.0.1", 0)

    async def close(self) -> None:
        assert self._server is not None
        self._server.close()
        self.resume()
        self.cut_all()
        if self._serving:
            await asyncio.wait(self._serving)

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._serving.add(task)
        task.add_done_callback(self._serving.discard)
        if self.refusing:
            writer.transport.abort()
            return
        try:
            upstream_reader, upstream_writer = await self._connect()
        except OSError:
            writer.transport.abort()
            return
        connection = _Connection(writer, upstream_writer)
        self._connections.add(connection)
        try:
            async with asyncio.TaskGroup() as tasks:
                tasks.create_task(self._pump(reader, upstream_writer, connection, requests=True))
                tasks.create_task(self._pump(upstream_reader, writer, connection, requests=False))
        finally:
            connection.cut()
            self._connections.discard(connection)

    async def _connect(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        if isinstance(self._upstream, Path):
            return await asyncio.open_unix_connection(self._upstream)
        return await asyncio.open_connection(*self._upstream)

    async def _pump(
        self,
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
        connection: _Connection,
        *,
        requests: bool,
    ) -> None:
        with contextlib.suppress(OSError):
            while piece := await reader.read(CHUNK):
                if self.delay_seconds:
                    await asyncio.sleep(self.delay_seconds)
                await (self._requests_flow if requests else self._replies_flow).wait()
                if requests and await self._strike(piece, writer, connection):
                    break
                if not requests and connection.cut_at_reply:
                    self.struck.set()
                    break
                writer.write(piece)
                await writer.drain()
        connection.cut()

    async def _strike(self, piece: bytes, writer: asyncio.StreamWriter, connection: _Connection) -> bool:
        """Do what is armed if this request matches; whether the connection ends here."""
        if self._armed is None or self._armed[1] not in piece:
            return False
        fault, self._armed = self._armed[0], None
        if fault is Fault.CUT_BEFORE_REPLY:
            connection.cut_at_reply = True
            return False
        if fault is Fault.CUT_AFTER_REQUEST:
            writer.write(piece)
            await writer.drain()
            writer.write_eof()  # behind the request, which therefore arrives whole
        self.struck.set()
        return True


@asynccontextmanager
async def proxied(upstream: Path | tuple[str, int]) -> AsyncIterator[Proxy]:
    """A running proxy in front of ``upstream``."""
    proxy = Proxy(upstream)
    await proxy.start()
    try:
        yield proxy
    finally:
        await proxy.close()
