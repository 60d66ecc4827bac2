"""For proofs: what is really in Postgres, read in the plainest possible way."""

from __future__ import annotations

from buffer.store import queries
from buffer.store.pool import Database

_SQL = queries.load("audit")


async def conversation_rows(database: Database, tenant: str, conversation: str) -> list[tuple[str, int]]:
    """(item id, position) of every item that is not removed, in position order."""
    async with database.connection() as connection:
        rows = await connection.fetch(_SQL["conversation_rows"], tenant, conversation)
    return [(row["item_id"], row["position"]) for row in rows]


async def forget_item(database: Database, tenant: str, conversation: str, item_id: str) -> None:
    """Plant a loss, so that a proof can show that it would notice one."""
    async with database.connection() as connection:
        await connection.execute(_SQL["forget_item"], tenant, conversation, item_id)
