"""An accepting process that changes and reads conversations, and writes down all that it saw.

Run as a child: ``python -m tests.support.view_process NAME HISTORY``, with the settings in the environment.
It ends with SIGTERM, after each client has settled its last call. The history has one JSON array a line,
each written at once:

* ``["append", sent, acked, conversation, [id, ...], replace_after id, [position, ...]]``;
* ``["remove", sent, acked, conversation, kind, item id, its position, position of the removal]``;
* ``["read", began, ended, conversation, turns, complete, last position, [[id, position], ...]]``;
* ``["unread", began, ended, conversation]``: it was refused;
* ``["wrong", at, what]``: something that must never be;
* ``["working"]`` at the beginning, and at the end ``["served", {outcome: how many reads}]``.

``acked`` and the positions after it are null where there was no answer. What certainly did not happen is left
out. Times are `time.monotonic`, which all processes of a machine share.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import os
import random
import signal
import sys
import time
from pathlib import Path
from typing import Any

from buffer import (
    Buffer,
    BufferError,
    Conversation,
    NotFound,
    OutcomeUnknown,
    PreconditionFailed,
    Unavailable,
)
from buffer.append.appender import Target
from buffer.model.types import Receipt
from tests.support.paths import on_path

CONVERSATIONS = 50
WRITERS = 5
READERS = 5
PAUSE_SECONDS = 0.02
ATTEMPT_SECONDS = 5.0
SETTLE_SECONDS = 20.0
TURNS = (1, 2, 3, 4, 5, 6, 8, 12, 100)


class Process:
    """All clients of this process. ``erasing``: conversations are erased, too."""

    def __init__(self, buffer: Buffer, name: str, history: int, *, erasing: bool) -> None:
        self._buffer = buffer
        self._name = name
        self._history = history
        self._erasing = erasing
        self._remove = buffer.runtime.appender.remove
        buffer.runtime.appender.remove = self._noted_remove  # type: ignore[method-assign]
        self.stopping = asyncio.Event()

    def note(self, kind: str, *values: Any) -> None:
        """One line of the history, in one write."""
        os.write(self._history, json.dumps([kind, *values]).encode() + b"\n")

    async def _noted_remove(
        self, target: Target, kind: str, item_id: str, position: int | None, **more: Any
    ) -> Receipt:
        """Callers of pop, delete_item and delete do not learn where the removal stands; this does."""
        sent = time.monotonic()
        noted = target.conversation, kind, item_id, position
        try:
            receipt = await self._remove(target, kind, item_id, position, **more)
        except OutcomeUnknown:
            self.note("remove", sent, None, *noted, None)
            raise
        self.note("remove", sent, time.monotonic(), *noted, receipt.position)
        return receipt

    async def write(self, client: int) -> None:
        """Change one conversation after the other."""
        number = 0
        while not self.stopping.is_set():
            number += 1
            name = f"c-{random.randrange(CONVERSATIONS)}"
            try:
                await self._change(self._buffer.conversation(name), f"{self._name}-{client}-{number}")
            except (NotFound, PreconditionFailed, OutcomeUnknown):
                pass
            except Unavailable as error:
                await asyncio.sleep(min(error.retry_after, 0.1))
            await asyncio.sleep(PAUSE_SECONDS * random.uniform(0.2, 1.8))

    async def _change(self, conversation: Conversation, item_id: str) -> None:
        chance = random.random()
        if chance < 0.6:
            await self._append(conversation, [item_id], None)
        elif chance < 0.72:
            await self._append(conversation, [f"{item_id}-{n}" for n in range(random.randint(2, 9))], None)
        elif chance < 0.80:
            await conversation.pop(timeout=ATTEMPT_SECONDS)
        elif chance < 0.98:
            turns = random.choice(TURNS)
            items = (await self._read(conversation, turns)) or []
            if not items:
                return
            if chance < 0.9:
                await conversation.delete_item(random.choice(items), timeout=ATTEMPT_SECONDS)
            else:
                await self._append(conversation, [item_id], random.choice(items))
        elif self._erasing:
            await conversation.delete(timeout=ATTEMPT_SECONDS)

    async def _append(self, conversation: Conversation, ids: list[str], replace_after: str | None) -> None:
        items = [{"of": item_id, "x": "x" * random.choice((0, 50, 600))} for item_id in ids]
        sent = time.monotonic()
        try:
            receipts = await conversation.extend(
                items, ids=ids, replace_after=replace_after, timeout=ATTEMPT_SECONDS
            )
        except OutcomeUnknown:
            self.note("append", sent, None, conversation.id, ids, replace_after, None)
            raise
        acked = time.monotonic()
        self.note("append", sent, acked, conversation.id, ids, replace_after, [r.position for r in receipts])

    async def read(self) -> None:
        """Read one conversation after the other."""
        while not self.stopping.is_set():
            conversation = self._buffer.conversation(f"c-{random.randrange(CONVERSATIONS)}")
            if random.random() < 0.05:  # somebody gives up in the middle
                with contextlib.suppress(TimeoutError, Unavailable):
                    async with asyncio.timeout(random.uniform(0, 0.004)):
                        await conversation.context()
            await self._read(conversation, random.choice(TURNS))
            await asyncio.sleep(PAUSE_SECONDS * random.uniform(0, 1))

    async def _read(self, conversation: Conversation, turns: int) -> list[str] | None:
        began = time.monotonic()
        try:
            context = await conversation.context(turns)
        except Unavailable:
            self.note("unread", began, time.monotonic(), conversation.id)
            return None
        seen = [(item.id, item.position) for item in context.items]
        told = turns, context.complete, context.last_position, seen
        self.note("read", began, time.monotonic(), conversation.id, *told)
        if wrong := [item.id for item in context.items if item["of"] != item.id]:
            self.note("wrong", began, f"{self._name}: other bodies than those of {wrong}")
        return [item.id for item in context.items]


async def main(name: str, history: Path, *, erasing: bool) -> None:
    """Change and read until SIGTERM."""
    async with Buffer.connect() as buffer:
        await on_path(buffer, "stream", seconds=SETTLE_SECONDS)
        log = os.open(history, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        process = Process(buffer, name, log, erasing=erasing)
        asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, process.stopping.set)
        process.note("working")
        clients = [*map(process.write, range(WRITERS)), *(process.read() for _ in range(READERS))]
        tasks = [asyncio.create_task(client) for client in clients]
        stopping = asyncio.create_task(process.stopping.wait())
        try:
            await asyncio.wait([stopping, *tasks], return_when=asyncio.FIRST_COMPLETED)
            async with asyncio.timeout(SETTLE_SECONDS):
                await asyncio.gather(*tasks)
        except (BufferError, TimeoutError) as error:
            process.note("wrong", time.monotonic(), f"{type(error).__name__}: {error}")
            raise
        finally:
            for task in (stopping, *tasks):
                task.cancel()
        served = buffer.runtime.metrics["cache_requests_total"]._counts
        process.note("served", {outcome: count for (_, _, outcome), count in served.items()})


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(name)s %(message)s")
    asyncio.run(main(sys.argv[1], Path(sys.argv[2]), erasing="erasing" in sys.argv[3:]))
