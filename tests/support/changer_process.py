"""An accepting process whose clients append, pop, delete and erase, and write down every answer they get.

Run as a child: ``python -m tests.support.changer_process NAME HISTORY``, with the settings in the
environment. It ends with SIGTERM. The history has one JSON array a line, each written at once, so that a
killed process leaves everything that its clients were told:

* ``["begin", number, at, kind, conversation, ids]``: ``kind`` is append, pop, item (delete one), erase,
  read (all items), context (the newest ones);
* ``["end", number, at, outcome, detail]``: ``outcome`` is ok, refused or unknown. ``detail`` is what was
  answered: positions; the popped [id, position] or null; nothing; the erased position; [[id, position], ...],
  whether it is complete, and whether older ones were left out. If unknown: the ids that the error names.

``at`` is `time.monotonic`, which all processes of a machine share.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import logging
import os
import random
import signal
import sys
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

from buffer import Buffer, Conflict, NotFound, OutcomeUnknown, Unavailable
from tests.support.paths import on_path

CLIENTS = 12
CONVERSATIONS = 6
WINDOW = 20  # items of a context
REUSED = 3  # ids that every conversation uses over and over, as far as it may
PAUSE_SECONDS = 0.02
ATTEMPT_SECONDS = 1.5
START_SECONDS = 20.0

# Out of 100 steps.
_STEPS = {"append": 44, "reuse": 8, "batch": 8, "pop": 6, "item": 6, "erase": 2, "read": 6, "context": 20}


def body_of(item_id: str) -> dict[str, str]:
    """The body that belongs to an id, so that nobody has to write it down."""
    return {"role": "user", "content": f"{item_id} " + "x" * 100}


class Changer:
    """All clients of this process."""

    def __init__(self, buffer: Buffer, name: str, history: int) -> None:
        self._buffer = buffer
        self._name = name
        self._history = history
        self._numbers = itertools.count()
        self.stopping = asyncio.Event()

    def note(self, *values: Any) -> None:
        """One line of the history, in one write."""
        os.write(self._history, json.dumps(values).encode() + b"\n")

    async def client(self, client: int) -> None:
        """Change one conversation, which others change as well, until told to stop."""
        name = f"c{client % CONVERSATIONS}"
        chance = random.Random(f"{self._name} {client}")
        mine: list[str] = []  # acked, and not deleted here
        for number in itertools.count():
            if self.stopping.is_set():
                return
            kind = chance.choices(list(_STEPS), weights=list(_STEPS.values()))[0]
            if kind in {"append", "reuse", "batch"}:
                ids = _ids(kind, f"{self._name}-{client}-{number}", chance)
                if await self._append(name, ids) and kind != "reuse":
                    mine += ids
            elif kind != "item":
                await self.step(kind, name, [], self._call(kind, name, ""))
            elif mine:
                item_id = mine.pop(chance.randrange(len(mine)))
                await self.step(kind, name, [item_id], self._call(kind, name, item_id))
            await asyncio.sleep(chance.uniform(0, 2 * PAUSE_SECONDS))

    async def _append(self, name: str, ids: list[str]) -> bool:
        """What has no certain outcome is repeated under the same ids, a few times."""
        conversation = self._buffer.conversation(name, user="u")

        async def extend() -> list[int]:
            bodies = [body_of(item_id) for item_id in ids]
            receipts = await conversation.extend(bodies, ids=ids, timeout=ATTEMPT_SECONDS)
            return [receipt.position for receipt in receipts]

        for _ in range(4):
            outcome = await self.step("append", name, ids, extend)
            if outcome == "ok":
                return True
            if self.stopping.is_set():
                break
        return False

    def _call(self, kind: str, name: str, item_id: str) -> Callable[[], Awaitable[Any]]:
        conversation = self._buffer.conversation(name)

        async def pop() -> list[Any] | None:
            item = await conversation.pop(timeout=ATTEMPT_SECONDS)
            return None if item is None else [item.id, item.position]

        async def item() -> None:
            await conversation.delete_item(item_id, timeout=ATTEMPT_SECONDS)

        async def erase() -> int:
            return (await conversation.delete(timeout=ATTEMPT_SECONDS)).through

        async def read() -> list[Any]:
            page = await conversation.items(limit=1_000)
            return [[[item.id, item.position] for item in page.items], page.complete, False]

        async def context() -> list[Any]:
            newest = await conversation.context(turns=WINDOW)
            places = [[item.id, item.position] for item in newest.items]
            return [places, newest.complete, len(places) == WINDOW]

        calls: dict[str, Callable[[], Awaitable[Any]]] = {
            "pop": pop,
            "item": item,
            "erase": erase,
            "read": read,
            "context": context,
        }
        return calls[kind]

    async def step(
        self, kind: str, conversation: str, ids: list[str], call: Callable[[], Awaitable[Any]]
    ) -> str:
        """One call, with a line before and after it; its outcome."""
        number = next(self._numbers)
        self.note("begin", number, time.monotonic(), kind, conversation, ids)
        outcome, detail = "ok", None
        try:
            detail = await call()
        except OutcomeUnknown as error:
            outcome, detail = "unknown", list(error.ids)
        except (
            Unavailable,
            NotFound,
            Conflict,
        ) as error:  # a conflict: a reused id belongs to a removed item
            outcome, detail = "refused", str(error)
            await asyncio.sleep(min(getattr(error, "retry_after", 0.0), 0.2))
        self.note("end", number, time.monotonic(), outcome, detail)
        return outcome


def _ids(kind: str, own: str, chance: random.Random) -> list[str]:
    """What an append is called: its own name, three of a batch, or one that is used over and over."""
    if kind == "reuse":
        return [f"reused-{chance.randrange(REUSED)}"]
    return [f"{own}-{part}" for part in range(3)] if kind == "batch" else [own]


async def main(name: str, history: Path) -> None:
    """Change until SIGTERM."""
    async with Buffer.connect() as buffer:
        await on_path(buffer, "stream", seconds=START_SECONDS)
        log = os.open(history, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        changer = Changer(buffer, name, log)
        asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, changer.stopping.set)
        async with asyncio.TaskGroup() as tasks:
            for client in range(CLIENTS):
                tasks.create_task(changer.client(client))


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(name)s %(message)s")
    asyncio.run(main(sys.argv[1], Path(sys.argv[2])))
