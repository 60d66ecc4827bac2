"""Summaries in Postgres, and the queue of conversations that may need one.

Whoever writes a summary, or removes items of a conversation, locks the conversation's row first. A summary
that was made meanwhile is written only if what it was made from is still there, unchanged and complete; a
removal takes away every summary that may hold what it removes (see `buffer.store.removals`). So what is gone
is in no summary.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from buffer.errors import Conflict, NotFound
from buffer.model.codec import decode_item
from buffer.model.types import Item, Summary
from buffer.store import queries, stale_views
from buffer.store.pool import Connection, Database, translated

APPLICATION = "application"

_SQL = queries.load("summaries")

# Older ones are only there for when a deletion takes the newest ones away.
_KEPT = 5


class Job(NamedTuple):
    """A conversation that this owner works on until its lease ends."""

    tenant: str
    conversation: str
    owner: str
    wanted: int
    failures: int


class Part(NamedTuple):
    """What the next summary is made from: the one before it, and the items that follow it."""

    previous: Summary | None
    items: list[Item]

    @property
    def after(self) -> int:
        """The position after which the items begin."""
        return self.previous.through if self.previous else 0


class SummaryStore:
    """Summaries of single conversations."""

    def __init__(self, database: Database) -> None:
        self._database = database

    async def newest(self, tenant: str, conversation: str) -> Summary | None:
        """The summary that counts."""
        async with self._database.connection() as connection:
            return await newest(connection, tenant, conversation)

    async def set(self, tenant: str, conversation: str, through: int, text: str) -> Summary:
        """The application's own, in place of one through the same position.

        Raises:
            NotFound: no item stands at ``through``.
            Conflict: there is a summary that goes further.
        """
        async with self._database.transaction() as connection:
            await connection.execute(_SQL["lock"], tenant, conversation)
            if not await connection.fetchval(_SQL["exists"], tenant, conversation, through):
                raise NotFound(f"through: conversation {conversation!r} has no item at position {through}")
            known = await newest(connection, tenant, conversation)
            if known is not None and known.through > through:
                raise Conflict(
                    f"through is {through} and must not go back: there is a summary through {known.through}"
                )
            created_at = await connection.fetchval(
                _SQL["set"], tenant, conversation, through, text, APPLICATION
            )
            await connection.execute(_SQL["prune"], tenant, conversation, _KEPT)
            await stale_views.note(connection, [(tenant, conversation)])
        return Summary(text, through, APPLICATION, created_at)

    async def exists(self, tenant: str, conversation: str, position: int) -> bool:
        """Whether an item stands at a position in Postgres."""
        async with self._database.connection() as connection:
            found: bool = await connection.fetchval(_SQL["exists"], tenant, conversation, position)
        return found

    # --- what a worker needs

    async def target(
        self, tenant: str, conversation: str, shard: int, keep_items: int, every_items: int
    ) -> tuple[bool, int | None]:
        """Whether Postgres has all that is acked, and how far a summary should go; None: none is due."""
        async with self._database.connection() as connection:
            row = await connection.fetchrow(
                _SQL["target"], tenant, conversation, shard, keep_items, every_items
            )
        assert row is not None
        return row["whole"], row["position"]

    async def part(
        self, tenant: str, conversation: str, through: int, most_items: int, most_bytes: int
    ) -> Part:
        """The newest summary, and the items after it up to ``through``: one at least, and as many as fit."""
        async with self._database.connection() as connection:
            previous = await newest(connection, tenant, conversation)
            after = previous.through if previous else 0
            rows = await connection.fetch(
                _SQL["part"], tenant, conversation, after, through, most_items, most_bytes
            )
        items = [
            Item(decode_item(r["data"]), id=r["item_id"], position=r["position"], created_at=r["created_at"])
            for r in rows
        ]
        return Part(previous, items)

    async def write(
        self, tenant: str, conversation: str, shard: int, part: Part, text: str, made_by: str
    ) -> Summary | None:
        """Keep a summary of ``part``; None if that is not what the conversation holds any more."""
        through = part.items[-1].position
        async with self._database.transaction() as connection:
            await connection.execute(_SQL["lock"], tenant, conversation)
            created_at = await connection.fetchval(
                _SQL["write"],
                tenant,
                conversation,
                shard,
                through,
                text,
                made_by,
                part.after,
                part.previous.created_at if part.previous else None,
                [item.position for item in part.items],
            )
            if created_at is None:
                return None
            await connection.execute(_SQL["prune"], tenant, conversation, _KEPT)
            await stale_views.note(connection, [(tenant, conversation)])
        return Summary(text, through, made_by, created_at)


class SummaryQueue:
    """Conversations that may need a summary, shared by the workers of all flushers.

    A claim moves the row's due time past the lease. A worker that outlives its lease does no harm:
    what two of them make from the same items is written once.
    """

    def __init__(self, database: Database) -> None:
        self._database = database

    async def add(self, conversations: Sequence[tuple[str, str]], enough: int) -> dict[tuple[str, str], int]:
        """Queue those with ``enough`` items that no summary covers.

        By (tenant, conversation), how many there are, counted up to ``enough``.
        """
        async with self._database.connection() as connection:
            rows = await connection.fetch(_SQL["queue"], *zip(*conversations, strict=True), enough)
        return {(r["tenant"], r["conversation"]): r["uncovered"] for r in rows}

    async def claim(self, owner: str, lease_seconds: float) -> Job | None:
        """Take one that is due."""
        async with self._database.connection() as connection:
            row = await connection.fetchrow(_SQL["claim"], owner, lease_seconds)
        return Job(row["tenant"], row["conversation"], owner, row["wanted"], row["failures"]) if row else None

    async def renew(self, job: Job, lease_seconds: float) -> bool:
        """Begin another lease; False if the job is somebody else's by now."""
        async with self._database.connection() as connection:
            ours = await connection.fetchval(
                _SQL["renew"], job.tenant, job.conversation, job.owner, lease_seconds
            )
        return ours is not None

    async def finish(self, job: Job) -> None:
        """Forget it, unless it was asked for again meanwhile: then it is due at once."""
        row = job.tenant, job.conversation, job.owner
        async with self._database.connection() as connection:
            if not await connection.fetchval(_SQL["finish"], *row, job.wanted):
                await connection.execute(_SQL["again"], *row)

    async def postpone(self, job: Job, seconds: float) -> None:
        """Let it be tried again later, by anybody."""
        await self._execute("postpone", job.tenant, job.conversation, job.owner, seconds)

    async def release(self, owners: Sequence[str]) -> None:
        """Whatever these owners hold is due for others."""
        await self._execute("release", list(owners))

    async def _execute(self, query: str, *arguments: object) -> None:
        async with self._database.connection() as connection:
            await connection.execute(_SQL[query], *arguments)


async def newest(connection: Connection, tenant: str, conversation: str) -> Summary | None:
    """The summary that counts, within a transaction of the caller."""
    with translated():
        row = await connection.fetchrow(_SQL["newest"], tenant, conversation)
    return Summary(row["text"], row["through"], row["made_by"], row["created_at"]) if row else None
