"""A chat-completions endpoint on a loopback port, that misbehaves on demand.

Its summaries can be checked: the answer names every ``n=7`` that the request holds, in order. So the text
of a summary tells exactly which items it was made from, however often it was rolled forward.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import re
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any, Literal

Behaviour = Literal["answer", "hang", "status", "garbage", "empty", "cut", "huge", "odd"]


def numbers(text: str) -> list[int]:
    """Which items a summary was made from."""
    return [int(number) for number in re.findall(r"n=(\d+)", text)]


class Endpoint:
    """What it was asked, and how it answers: ``behaviour`` counts from the next request on."""

    def __init__(self) -> None:
        self.behaviour: Behaviour = "answer"
        self.requests: list[dict[str, Any]] = []
        self.headers: list[str] = []
        self.waiting = 0
        self.released = asyncio.Event()
        self.url = ""

    def material(self, index: int = -1) -> str:
        """The user message of a request."""
        text: str = self.requests[index]["messages"][-1]["content"]
        return text

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(ConnectionError, asyncio.IncompleteReadError):
            head = (await reader.readuntil(b"\r\n\r\n")).decode()
            length = int(re.search(r"(?i)content-length: (\d+)", head)[1])  # type: ignore[index]
            self.headers.append(head)
            self.requests.append(json.loads(await reader.readexactly(length)))
            await self._answer(self.behaviour, self.material(), reader, writer)
        writer.close()

    async def _answer(
        self,
        behaviour: Behaviour,
        material: str,
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
    ) -> None:
        if behaviour == "hang":
            self.waiting += 1
            gone = asyncio.create_task(reader.read())
            released = asyncio.create_task(self.released.wait())
            await asyncio.wait([gone, released], return_when=asyncio.FIRST_COMPLETED)
            gone.cancel()
            released.cancel()
            self.waiting -= 1
        text = " ".join(f"n={number}" for number in numbers(material))
        content: Any = {"empty": " \n", "odd": [{"type": "text", "text": f"{text}\x00\ud800"}]}.get(
            behaviour, text
        )
        body = json.dumps({"choices": [{"message": {"role": "assistant", "content": content}}]}).encode()
        if behaviour == "garbage":
            body = b'{"choices": [null]}'
        status = "500 Oops" if behaviour == "status" else "200 OK"
        length = 10 << 20 if behaviour == "huge" else len(body)
        writer.write(f"HTTP/1.1 {status}\r\nContent-Length: {length}\r\nConnection: close\r\n\r\n".encode())
        writer.write(b" " * length if behaviour == "huge" else body[:10] if behaviour == "cut" else body)
        await writer.drain()


@asynccontextmanager
async def endpoint() -> AsyncIterator[Endpoint]:
    """One that is listening."""
    made = Endpoint()
    server = await asyncio.start_server(made.serve, "127.0.0.1", 0)
    made.url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}/v1"
    try:
        yield made
    finally:
        made.released.set()
        server.close()
