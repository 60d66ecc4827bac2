"""Conversations whose committed items changed without passing through the stream: their views are stale.

Imports and dead letters do that. Whoever does it notes the conversation here, in the transaction of the
change; a flusher drops the view within a second. A crash between the two changes nothing: the note stays.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterable, Sequence
from contextlib import asynccontextmanager

from buffer.store import queries
from buffer.store.pool import Connection, Database, translated

_SQL = queries.load("stale_views")

_MOST = 1_000


async def note(connection: Connection, conversations: Iterable[tuple[str, str]]) -> None:
    """Note (tenant, conversation) pairs, within a transaction of the caller."""
    if pairs := sorted(set(conversations)):
        with translated():
            await connection.execute(_SQL["note"], *zip(*pairs, strict=True))


@asynccontextmanager
async def taken(database: Database) -> AsyncIterator[tuple[list[tuple[str, str]], Sequence[int | None]]]:
    """Some of the noted pairs, which are forgotten if the body succeeds; and each shard's epoch in Redis.

    A shard whose path is not the stream has None: it has no views, and will begin with none.
    """
    async with database.transaction() as connection:
        rows = await connection.fetch(_SQL["take"], _MOST)
        epochs = await connection.fetch(_SQL["epochs"]) if rows else []
        yield [(row["tenant"], row["conversation"]) for row in rows], [row["epoch"] for row in epochs]
