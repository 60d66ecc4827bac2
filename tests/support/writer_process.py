"""An accepting process whose clients append at a steady pace and write down every answer they get.

Run as a child: ``python -m tests.support.writer_process NAME HISTORY``, with the settings in the environment.
It ends with SIGTERM, after each client has settled its last append. The history has one JSON array a line,
each written at once, so that a killed process leaves everything that its clients were told:

* ``["sent", at, conversation, id]``: before the first attempt of an append;
* ``["ack", at, conversation, id, position, level, path, duplicate, client]``;
* ``["unknown" | "refused", at, conversation, id, seconds]``: an attempt failed; it is repeated;
* ``["read" | "unread", at, conversation, complete, seconds]``: a read succeeded, or was refused;
* ``["wrong", at, what]``: something that must never be.

``at`` is `time.monotonic`, which all processes of a machine share.
"""

from __future__ import annotations

import asyncio
import json
import logging
import os
import random
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from buffer import Buffer, BufferError, Conversation, OutcomeUnknown, Unavailable
from tests.support.paths import on_path

CLIENTS = 20
SHARED = 4  # conversations that clients of all processes append to
TWINS = 2  # conversations to which every process appends the same items, under the same ids
TWIN_SECONDS = 0.1
PAUSE_SECONDS = 0.03
READ_EVERY = 8
WINDOW = 20
ATTEMPT_SECONDS = 1.0
START_SECONDS = 20.0
SETTLE_SECONDS = 15.0


def body_of(item_id: str) -> dict[str, str]:
    """The body that belongs to an id, so that nobody has to write it down."""
    return {"role": "user", "content": f"{item_id} " + "x" * 200}


class Writer:
    """All clients of this process."""

    def __init__(self, buffer: Buffer, name: str, history: int) -> None:
        self._buffer = buffer
        self._name = name
        self._history = history
        self.stopping = asyncio.Event()

    def note(self, kind: str, *values: Any) -> None:
        """One line of the history, in one write."""
        os.write(self._history, json.dumps([kind, time.monotonic(), *values]).encode() + b"\n")

    async def own(self, client: int) -> None:
        """Append to a conversation that nobody else writes to, and now and then to a shared one."""
        own = self._buffer.conversation(f"own-{self._name}-{client}", user=self._name)
        shared = self._buffer.conversation(f"shared-{client % SHARED}")
        acked: list[str] = []
        number = 0
        await asyncio.sleep(random.uniform(0, PAUSE_SECONDS))
        while not self.stopping.is_set():
            number += 1
            into = own if number % 4 else shared
            item_id = f"{self._name}-{client}-{number}"
            position = await self._append(into, item_id, client)
            if into is own:
                acked.append(item_id)
                if number % READ_EVERY == client % READ_EVERY:
                    await self._read_window(own, acked[-WINDOW:])
            elif number % READ_EVERY == 0:
                await self._read_from(shared, item_id, position)
            await asyncio.sleep(PAUSE_SECONDS * random.uniform(0.5, 1.5))

    async def twin(self, number: int) -> None:
        """Append what the same client of every other process appends at the same moment."""
        conversation = self._buffer.conversation(f"twin-{number}")
        for item_id in self._slots():
            await self._append(conversation, item_id, CLIENTS + number)
            await asyncio.sleep(TWIN_SECONDS - time.time() % TWIN_SECONDS)

    def _slots(self) -> Iterator[str]:
        before = 0
        while not self.stopping.is_set():
            slot = max(before + 1, int(time.time() / TWIN_SECONDS))
            before = slot
            yield f"slot-{slot}"

    async def _append(self, conversation: Conversation, item_id: str, client: int) -> int:
        """Append until it is acked; what fails is repeated with the same id. Its position."""
        name, body = conversation.id, body_of(item_id)
        self.note("sent", name, item_id)
        while True:
            began = time.monotonic()
            try:
                receipt = await conversation.append(body, id=item_id, timeout=ATTEMPT_SECONDS)
            except OutcomeUnknown:
                self.note("unknown", name, item_id, time.monotonic() - began)
            except Unavailable as error:
                self.note("refused", name, item_id, time.monotonic() - began)
                await self._read_refused(conversation)
                await asyncio.sleep(min(error.retry_after, 0.2))
            else:
                what = (receipt.position, receipt.level, receipt.path, receipt.duplicate, client)
                self.note("ack", name, receipt.id, *what)
                return receipt.position

    async def _read_window(self, conversation: Conversation, expected: list[str]) -> None:
        """Nobody else writes to it, so its newest items are known exactly."""
        began = time.monotonic()
        try:
            read = await conversation.context(turns=len(expected))
        except Unavailable:
            self.note("unread", conversation.id, False, time.monotonic() - began)
            return
        self.note("read", conversation.id, read.complete, time.monotonic() - began)
        seen = [item.id for item in read.items]
        if read.complete and seen != expected:
            self.note("wrong", f"stale read of {conversation.id}: {seen}, and acked was {expected}")

    async def _read_from(self, conversation: Conversation, item_id: str, position: int) -> None:
        """Others write to it, too; what was acked a moment ago stands where its receipt says."""
        began = time.monotonic()
        try:
            read = await conversation.items(after=position - 1, limit=5)
        except Unavailable:
            self.note("unread", conversation.id, False, time.monotonic() - began)
            return
        self.note("read", conversation.id, read.complete, time.monotonic() - began)
        if read.complete and (not read.items or read.items[0].id != item_id):
            seen = [(item.id, item.position) for item in read.items]
            self.note("wrong", f"stale read of {conversation.id}: {seen} from {item_id} at {position}")

    async def _read_refused(self, conversation: Conversation) -> None:
        """Who cannot append asks whether it can read; both answers will do, if they come soon."""
        began = time.monotonic()
        try:
            read = await conversation.context(turns=1)
        except Unavailable:
            self.note("unread", conversation.id, False, time.monotonic() - began)
        else:
            self.note("read", conversation.id, read.complete, time.monotonic() - began)


async def main(name: str, history: Path) -> None:
    """Write until SIGTERM."""
    async with Buffer.connect() as buffer:
        # What was appended before the first flusher came would be looked up in Postgres for a long time.
        await on_path(buffer, "stream", seconds=START_SECONDS)
        log = os.open(history, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        writer = Writer(buffer, name, log)
        asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, writer.stopping.set)
        clients = [writer.own(client) for client in range(CLIENTS)]
        tasks = [asyncio.create_task(c) for c in (*clients, *map(writer.twin, range(TWINS)))]
        stopping = asyncio.create_task(writer.stopping.wait())
        try:
            await asyncio.wait([stopping, *tasks], return_when=asyncio.FIRST_COMPLETED)
            async with asyncio.timeout(SETTLE_SECONDS):
                await asyncio.gather(*tasks)
        except (BufferError, TimeoutError) as error:
            writer.note("wrong", f"{type(error).__name__}: {error}")
            raise
        finally:
            for task in (stopping, *tasks):
                task.cancel()


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(name)s %(message)s")
    asyncio.run(main(sys.argv[1], Path(sys.argv[2])))
