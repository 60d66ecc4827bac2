"""Erasures as data: read page by page, and applied once more to a database that was restored.

A restore brings back what was erased after the backup was made. Applying the tombstones again deletes it, and
makes sure that nothing is ever appended at a position which a tombstone covers.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping, Sequence
from datetime import datetime
from typing import Any, NamedTuple

from buffer.model.ids import conversation_key, shard_of
from buffer.store import queries, removals, stale_views
from buffer.store.path_moves import move_past
from buffer.store.paths import lock
from buffer.store.pool import Database, translated
from buffer.store.removals import Erasure

_SQL = queries.load("erasures")

_PAGE = 1_000


class ErasedConversation(NamedTuple):
    """A conversation's tombstone: everything up to position ``through`` is erased."""

    tenant: str
    conversation: str
    through: int
    erased_at: datetime


class ErasedUser(NamedTuple):
    """A user's tombstone."""

    tenant: str
    user: str
    erased_at: datetime


class Applied(NamedTuple):
    """How many tombstones were not there, or not as far; and how many items were deleted."""

    new: int
    items: int


async def conversations(database: Database) -> AsyncIterator[list[ErasedConversation]]:
    """All tombstones of conversations, in pages."""
    async for rows in _pages(database, "conversations"):
        yield [ErasedConversation(*row) for row in rows]


async def users(database: Database) -> AsyncIterator[list[ErasedUser]]:
    """All tombstones of users, in pages."""
    async for rows in _pages(database, "users"):
        yield [ErasedUser(*row) for row in rows]


async def _pages(database: Database, query: str) -> AsyncIterator[list[tuple[Any, ...]]]:
    """The rows of a query in pages; their first two columns, the tenant and an id, are its cursor."""
    after: tuple[Any, ...] = ("", "")
    while True:
        async with database.connection() as connection:
            rows = await connection.fetch(_SQL[query], *after, _PAGE)
        if not rows:
            return
        yield [tuple(row) for row in rows]
        after = tuple(rows[-1])[:2]


async def apply_conversations(
    database: Database, erased: Sequence[ErasedConversation], shards: int
) -> Applied:
    """Put tombstones in force, and delete what they cover, in one transaction.

    ``erased`` names each conversation once. To do it again changes nothing.
    """
    last: dict[int, int] = {}
    for one in erased:
        shard = shard_of(conversation_key(one.tenant, one.conversation), shards)
        last[shard] = max(one.through, last.get(shard, 0))
    async with database.transaction() as connection:
        rows = await lock(connection, last)
        with translated():
            put = await connection.fetch(_SQL["put_conversations"], *zip(*erased, strict=True))
        raised = {Erasure(*row) for row in put}
        covered = [Erasure(*one[:3]) for one in erased]
        deleted = await removals.wipe(connection, [one for one in covered if one in raised])
        # Those that stood here before cover nothing any more, unless rows were restored without them.
        deleted |= await removals.delete(connection, [one for one in covered if one not in raised])
        if deleted:
            await connection.execute(_SQL["fence"], list(last))
            await stale_views.note(connection, deleted)
        for shard, through in last.items():
            await move_past(connection, shard, rows[shard], through)
    return Applied(len(raised), _total(deleted))


async def apply_users(database: Database, erased: Sequence[ErasedUser]) -> int:
    """Note that users are erased; how many were not, or earlier. Their conversations have tombstones."""
    async with database.transaction() as connection:
        return len(await connection.fetch(_SQL["put_users"], *zip(*erased, strict=True)))


def _total(deleted: Mapping[tuple[str, str], int]) -> int:
    return sum(deleted.values())
