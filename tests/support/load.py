"""Writers that append without pause and note every answer in a ledger."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from buffer import Buffer, OutcomeUnknown, Unavailable
from tests.support.ledger import Ledger


class Load:
    """What the writers of `under_load` did so far."""

    def __init__(self, ledger: Ledger) -> None:
        self.ledger = ledger
        self.refused = 0  # answers "not stored, try again"
        self.unknown = 0  # answers "may be stored"
        self.stopping = asyncio.Event()
        self._began = time.monotonic()

    @property
    def acked(self) -> int:
        return self.ledger.items

    @property
    def per_second(self) -> float:
        return self.acked / (time.monotonic() - self._began)

    async def write(self, buffer: Buffer, name: str, pause_seconds: float) -> None:
        """Append to one conversation until told to stop; what fails is repeated with the same id."""
        conversation = buffer.conversation(name, tenant=self.ledger.tenant, user="load")
        number = 0
        while not self.stopping.is_set():
            number += 1
            body = {"role": "user", "content": f"{name} says {number} " + "x" * 200, "n": number}
            item_id = f"m-{number}"
            self.ledger.unknown(name, item_id, body)
            while True:
                try:
                    receipt = await conversation.append(body, id=item_id, timeout=1)
                except OutcomeUnknown:
                    self.unknown += 1
                except Unavailable as error:
                    self.refused += 1
                    await asyncio.sleep(min(error.retry_after, 0.2))
                else:
                    self.ledger.ack(name, receipt, body)
                    break
            if pause_seconds:
                await asyncio.sleep(pause_seconds)


@asynccontextmanager
async def under_load(
    buffer: Buffer, *, writers: int = 16, pause_seconds: float = 0.0, tenant: str = "default"
) -> AsyncIterator[Load]:
    """Run writers, each with a conversation of its own; at the end each finishes its last append."""
    load = Load(Ledger(tenant))
    async with asyncio.TaskGroup() as tasks:
        for number in range(writers):
            tasks.create_task(load.write(buffer, f"load-{number}", pause_seconds))
        try:
            yield load
        finally:
            load.stopping.set()
