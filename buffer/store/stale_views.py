"""Conversations whose committed items changed without passing through the stream: their views are stale.

Imports and dead letters do that. Whoever does it notes the conversation here, in the transaction of the
change; a flusher drops the view within a second. A crash between the two changes nothing: the note stays.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterable
from contextlib import asynccontextmanager
from typing import NamedTuple

from buffer.store import queries
from buffer.store.pool import Connection, Database, translated

_SQL = queries.load("stale_views")

_MOST = 1_000


class Streaming(NamedTuple):
    """A shard whose path is the stream: its epoch, and the position through which it is committed."""

    epoch: int
    flushed_through: int


async def note(connection: Connection, conversations: Iterable[tuple[str, str]]) -> None:
    """Note (tenant, conversation) pairs, within a transaction of the caller."""
    if pairs := sorted(set(conversations)):
        with translated():
            await connection.execute(_SQL["note"], *zip(*pairs, strict=True))


@asynccontextmanager
async def taken(database: Database) -> AsyncIterator[tuple[list[tuple[str, str]], list[Streaming | None]]]:
    """Some of the noted pairs, which are forgotten if the body succeeds; and each shard's path after that.

    A shard whose path is not the stream has None: it has no views, and will begin with none.
    """
    async with database.transaction() as connection:
        rows = await connection.fetch(_SQL["take"], _MOST)
        paths = await connection.fetch(_SQL["paths"]) if rows else []
        yield (
            [(row["tenant"], row["conversation"]) for row in rows],
            [Streaming(epoch, through) if mode == "stream" else None for mode, epoch, through in paths],
        )
