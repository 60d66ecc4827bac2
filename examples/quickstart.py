"""Ten lines: append, read back at once, and wait until it is in Postgres."""

import asyncio

from buffer import Buffer


async def main() -> None:
    """Run against embedded servers."""
    async with Buffer.embedded() as buf:  # real Valkey and Postgres, started here, with a flusher
        conv = buf.conversation("c7", tenant="acme", user="u42")
        receipt = await conv.append({"role": "user", "content": "hi"}, id="m-91")
        print(receipt.level, receipt.duplicate, (await conv.context(turns=20)).items)
        again = await conv.append({"role": "user", "content": "hi"}, id="m-91")
        print(again.duplicate, again.position == receipt.position)
        await conv.flushed(receipt)
        print((await conv.items()).items, "in Postgres")


asyncio.run(main())
