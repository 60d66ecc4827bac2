"""Removals and erasures, within a transaction of the caller.

What is removed stays as a stub, which keeps its id from being used again; what is erased is gone, but for a
tombstone. Neither holds content. Every way into the tables looks at both, so that nothing comes back.

The caller holds the shard's row locked: what is placed or set aside at the same moment waits, or is seen.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from typing import NamedTuple

from buffer.store import queries
from buffer.store.pool import Connection, Database, translated

_SQL = queries.load("removals")

_PAGE = 50


class Cut(NamedTuple):
    """The entry at ``position`` removes the items between two positions, both excluded.

    ``item_id``: it deletes that item alone.
    """

    tenant: str
    conversation: str
    position: int
    after: int
    before: int
    item_id: str | None


class Erasure(NamedTuple):
    """Everything of a conversation up to a position is erased."""

    tenant: str
    conversation: str
    through: int


async def remove(connection: Connection, cuts: Sequence[Cut]) -> set[int]:
    """Remove items; the positions of those cuts that were new."""
    tenants, conversations, positions, after, before, ids = zip(*cuts, strict=True)
    with translated():
        await connection.execute(_SQL["lock_conversations"], tenants, conversations)
        new = await connection.fetch(
            _SQL["add_removals"], tenants, conversations, positions, after, before, ids
        )
        # Letters before items: a retry of one holds it locked until its item is there.
        await connection.execute(_SQL["remove_letters"], tenants, conversations, after, before)
        await connection.execute(_SQL["remove_items"], tenants, conversations, after, before)
        fresh = {row["position"] for row in new}
        applied = [cut for cut in cuts if cut.position in fresh]
        columns = zip(*((cut.tenant, cut.conversation, cut.after) for cut in applied), strict=True)
        if applied:
            await connection.execute(_SQL["remove_summaries"], *columns)
    return fresh


async def erase(connection: Connection, erasures: Sequence[Erasure]) -> set[Erasure]:
    """Erase conversations up to a position; which of the erasures were new.

    The others find nothing: what they erase is gone, and every way into the tables looks at tombstones.
    """
    last: dict[tuple[str, str], int] = {}
    for tenant, conversation, through in erasures:
        last[tenant, conversation] = max(through, last.get((tenant, conversation), 0))
    tenants, conversations = zip(*last, strict=True)
    with translated():
        new = await connection.fetch(_SQL["add_tombstones"], tenants, conversations, list(last.values()))
    raised = {Erasure(r["tenant"], r["conversation"], r["through"]) for r in new}
    await wipe(connection, sorted(raised))
    return {erasure for erasure in erasures if any(erasure[:2] == other[:2] for other in raised)}


async def wipe(connection: Connection, erasures: Sequence[Erasure]) -> dict[tuple[str, str], int]:
    """Delete conversations up to a position each; how many items of those that had any."""
    if not erasures:
        return {}
    tenants, conversations, through = zip(*erasures, strict=True)
    with translated():
        await connection.execute(_SQL["make_conversations"], tenants, conversations)
        await connection.execute(_SQL["lock_conversations"], tenants, conversations)
        deleted = await delete(connection, erasures)
        await connection.execute(_SQL["erase_conversations"], tenants, conversations, through)
        # All of them: one that goes further was rolled forward from what is erased.
        await connection.execute(_SQL["remove_summaries"], tenants, conversations, [0] * len(tenants))
    return deleted


async def delete(connection: Connection, erasures: Sequence[Erasure]) -> dict[tuple[str, str], int]:
    """Delete what conversations hold up to a position each; how many items of those that had any."""
    if not erasures:
        return {}
    columns = list(zip(*erasures, strict=True))
    with translated():
        await connection.execute(_SQL["erase_letters"], *columns)
        rows = await connection.fetch(_SQL["erase_items"], *columns)
        await connection.execute(_SQL["erase_removals"], *columns)
        await connection.execute(_SQL["erase_summaries"], *columns)
    return {(r["tenant"], r["conversation"]): r["items"] for r in rows}


async def erasable_conversations(database: Database, tenant: str, user: str) -> AsyncIterator[list[str]]:
    """Note that the user is erased, and go once through the user's conversations, in pages of ids."""
    async with database.transaction() as connection:
        await connection.execute(_SQL["add_user_tombstone"], tenant, user)
    after = ""
    while True:
        async with database.connection() as connection:
            rows = await connection.fetch(_SQL["user_conversations"], tenant, user, after, _PAGE)
        if not rows:
            return
        yield [row["conversation"] for row in rows]
        after = rows[-1]["conversation"]
