"""Two processes append to one conversation: each is in order, and together they make one order."""

from __future__ import annotations

import json

import asyncpg
import pytest

from buffer import Buffer, Receipt, Settings
from tests.support.ledger import Ledger, in_postgres, in_reads
from tests.support.polling import eventually
from tests.support.processes import Commands

pytestmark = pytest.mark.attack

APPENDS = 500
WRITER = f"""
import asyncio, json, sys
from buffer import Buffer

async def main():
    async with Buffer.connect() as buffer:
        conversation = buffer.conversation("shared")
        async def append(number):
            body = {{"role": "user", "content": f"{{sys.argv[1]}} {{number}}"}}
            receipt = await conversation.append(body)
            print(json.dumps([receipt.id, receipt.position, body]), flush=True)
        for number in range(0, {APPENDS}, 5):
            await asyncio.gather(*(append(number + i) for i in range(5)))

asyncio.run(main())
"""


async def test_two_processes_appending_to_one_conversation_make_one_order(
    buffer: Buffer, settings: Settings, postgres: asyncpg.Connection, commands: Commands
) -> None:
    """Every ack of both is there once, in each one's order, at its position."""
    writers = {name: commands.start(settings, "-c", WRITER, name) for name in ("one", "two")}
    for writer in writers.values():
        assert await eventually(lambda writer=writer: writer.exit_code is not None and writer, seconds=30)
        assert writer.exit_code == 0, writer.text
    ledger = Ledger()
    for name, writer in writers.items():
        for line in writer.text.splitlines():
            item_id, position, body = json.loads(line)
            ledger.ack("shared", Receipt(item_id, position, "buffered"), body, writer=name)
    assert ledger.items == 2 * APPENDS
    assert not ledger.faults(await in_reads(buffer, ["shared"]))
    await buffer.flush()
    contents = await in_postgres(postgres)
    assert not ledger.faults(contents)
    by_position = [str(item.body["content"]).split()[0] for item in contents["shared"]]
    assert len(set(by_position[APPENDS // 2 : -APPENDS // 2])) == 2, "they did not run at the same time"
