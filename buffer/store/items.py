"""Items in Postgres: reading pages, and writing batches within a transaction of the caller."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterable, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import NamedTuple

import asyncpg

from buffer.model.types import Summary
from buffer.policy.merge import Pending
from buffer.store import copy_format, queries
from buffer.store.pool import BadRows, Connection, Database, DuplicateRows, bounded, translated

_SQL = queries.load("items")
_COLUMNS = ("tenant", "conversation", "position", "item_id", "created_at", "data")
_COPY_CHUNK_BYTES = 128 << 10


# Tenant, conversation, item id: what makes an item the same item.
Identity = tuple[str, str, str]


class Row(NamedTuple):
    """One row of ``buffer.items``; ``data`` None: the item was removed."""

    tenant: str
    conversation: str
    position: int
    item_id: str
    created_at: datetime
    data: str | None


class NewConversation(NamedTuple):
    """A conversation that a batch may be the first to mention.

    ``created_at`` and ``active_at`` are the times of its first and its last item there.
    """

    tenant: str
    conversation: str
    user: str | None
    created_at: datetime
    active_at: datetime


class Recorded(NamedTuple):
    """Conversations (tenant, id) that were not known before, and those that have a user."""

    added: set[tuple[str, str]]
    with_user: set[tuple[str, str]]


@dataclass(slots=True, frozen=True)
class StoredItem:
    """An item as a read finds it; ``data`` is its JSON."""

    position: int
    item_id: str
    created_at: datetime
    data: str


class Where(NamedTuple):
    """A part of a conversation: positions between ``after`` and ``before``, both excluded."""

    tenant: str
    conversation: str
    shard: int
    after: int
    before: int


@dataclass(slots=True, frozen=True)
class Slice:
    """Items in the order of the query, and how far their shard was flushed in the same snapshot.

    ``known`` holds those of the unflushed ids that are stored already. ``complete`` is False while the
    conversation has dead letters, or a process that may hold a part of the shard is missing. ``epoch`` and
    ``mode`` are the shard's path. ``last_position`` counts removed items and removals, too.
    """

    epoch: int
    mode: str
    flushed_through: int
    items: list[StoredItem]
    known: frozenset[str]
    complete: bool
    last_position: int | None
    summary: Summary | None


@dataclass(slots=True, frozen=True)
class Snapshot:
    """A conversation's newest items, and what else a view of it holds. ``more``: there are older ones."""

    slice: Slice
    more: bool
    first: StoredItem | None


class ItemReader:
    """Reads of one conversation at a time."""

    def __init__(self, database: Database) -> None:
        self._database = database

    async def newest(self, where: Where, limit: int, pending: Sequence[Pending]) -> Slice:
        """Up to ``limit`` items, newest first; ``pending`` is the unflushed tail as it was read before."""
        return await self._slice("newest", where, limit, pending)

    async def oldest(self, where: Where, limit: int, pending: Sequence[Pending]) -> Slice:
        """Up to ``limit`` items, oldest first; ``pending`` as in `newest`."""
        return await self._slice("oldest", where, limit, pending)

    async def _slice(self, query: str, where: Where, limit: int, pending: Sequence[Pending]) -> Slice:
        removing = [(p.removal, p.item_id or "") for p in pending if p.removal is not None]
        async with self._database.connection() as connection:
            rows = await connection.fetch(
                _SQL[query],
                where.tenant,
                where.conversation,
                where.after,
                where.before,
                limit,
                where.shard,
                [removal.after for removal, _ in removing],
                [removal.before for removal, _ in removing],
                [item_id for _, item_id in removing],
                [p.item_id for p in pending if p.item_id is not None],
            )
        return _slice(rows)

    async def snapshot(
        self, where: Where, needed: int, most_items: int, most_bytes: int, pending: Sequence[str]
    ) -> Snapshot:
        """The newest items, newest first: all that are needed, and more as far as they fit into a view.

        Unflushed removals are not applied; ``pending`` are the unflushed ids, of which ``known`` tells.
        """
        async with self._database.connection() as connection:
            rows = await connection.fetch(
                _SQL["snapshot"],
                where.tenant,
                where.conversation,
                where.shard,
                pending,
                needed,
                most_items,
                most_bytes,
            )
        top = rows[0]
        stored = _slice(rows)
        first = None
        if top["first_data"] is not None:
            first = StoredItem(
                top["first_position"], top["first_id"], top["first_created_at"], top["first_data"]
            )
        more = top["looked_at"] is not None and top["looked_at"] > len(stored.items)
        return Snapshot(stored, more, first)

    async def last_position(self, tenant: str, conversation: str) -> int | None:
        """The conversation's last position in Postgres, removed items and removals included."""
        async with self._database.connection() as connection:
            position: int | None = await connection.fetchval(_SQL["last_position"], tenant, conversation)
        return position

    async def check_reachable(self) -> None:
        """Return if Postgres answers.

        Raises:
            PostgresUnavailable: it does not.
        """
        async with self._database.connection() as connection:
            await connection.fetchval("select 1")

    async def was_removed(self, tenant: str, conversation: str, position: int) -> bool:
        """Whether the deletion or erasure at ``position`` has happened."""
        async with self._database.connection() as connection:
            happened: bool = await connection.fetchval(_SQL["was_removed"], tenant, conversation, position)
        return happened

    async def positions(
        self, tenant: str, conversation: str, item_ids: Sequence[str]
    ) -> dict[str, tuple[int, bool]]:
        """(position, whether it was removed) of those items that are in Postgres."""
        async with self._database.connection() as connection:
            rows = await connection.fetch(_SQL["positions"], tenant, conversation, item_ids)
        return {r["item_id"]: (r["position"], r["removed"]) for r in rows}


def _slice(rows: Sequence[asyncpg.Record]) -> Slice:
    top = rows[0]
    return Slice(
        top["path_epoch"],
        top["mode"],
        top["flushed_through"],
        [
            StoredItem(r["position"], r["item_id"], r["created_at"], r["data"])
            for r in rows
            if r["position"] is not None
        ],
        frozenset(top["known"]),
        not top["incomplete"],
        top["last_position"],
        _summary(top),
    )


def _summary(row: asyncpg.Record) -> Summary | None:
    if row.get("summary_through") is None:
        return None
    return Summary(
        row["summary_text"], row["summary_through"], row["summary_made_by"], row["summary_created_at"]
    )


async def copy_rows(connection: Connection, rows: Iterable[Row]) -> None:
    """The fast path: all rows or an error (`DuplicateRows` where an id is taken)."""
    with translated():
        async with bounded(connection):
            await connection.copy_records_to_table(
                "items", schema_name="buffer", columns=_COLUMNS, records=rows
            )


async def copy_encoded(connection: Connection, rows: Iterable[bytes], timeout_seconds: float) -> None:
    """The same for rows that are encoded already, see `buffer.store.copy_format`."""
    with translated():
        async with bounded(connection, timeout_seconds):
            await connection.copy_to_table(
                "items", schema_name="buffer", columns=_COLUMNS, source=_chunks(rows), format="binary"
            )


async def _chunks(rows: Iterable[bytes]) -> AsyncIterator[bytes]:
    """Pieces of a size that one send takes; between them the event loop gets its turn."""
    piece = bytearray(copy_format.HEADER)
    for row in rows:
        piece += row
        if len(piece) >= _COPY_CHUNK_BYTES:
            yield bytes(piece)
            piece.clear()
            await asyncio.sleep(0)
    piece += copy_format.TRAILER
    yield bytes(piece)


async def find_bad_rows(
    connection: Connection, rows: Sequence[bytes], timeout_seconds: float
) -> dict[int, str]:
    """Which rows Postgres refuses, and why: halves are tried until single rows are left.

    Every try is rolled back. Within a transaction of the caller.
    """
    bad: dict[int, str] = {}

    async def probe(first: int, last: int) -> None:
        try:
            async with connection.transaction():
                await copy_encoded(connection, rows[first:last], timeout_seconds)
                raise _Undo  # noqa: TRY301 - this is how a savepoint is rolled back
        except _Undo:
            return
        except (BadRows, DuplicateRows) as error:
            if last - first > 1:
                middle = (first + last) // 2
                await probe(first, middle)
                await probe(middle, last)
            elif isinstance(error, BadRows):
                bad[first] = str(error)

    if rows:
        await probe(0, len(rows))
    return bad


class _Undo(Exception):
    """Rolls a try back."""


async def present(connection: Connection, ids: Sequence[Identity]) -> dict[Identity, tuple[int, str | None]]:
    """(position, data) of what is stored under these (tenant, conversation, item id)."""
    with translated():
        rows = await connection.fetch(_SQL["present"], *zip(*ids, strict=True))
    return {(r["tenant"], r["conversation"], r["item_id"]): (r["position"], r["data"]) for r in rows}


async def add_conversations(connection: Connection, new: Sequence[NewConversation]) -> Recorded:
    """Record conversations; one that is known may gain a user and move up."""
    with translated():
        rows = await connection.fetch(_SQL["add_conversations"], *zip(*new, strict=True))
    return Recorded(
        {(r["tenant"], r["conversation"]) for r in rows if r["added"]},
        {(r["tenant"], r["conversation"]) for r in rows if r["has_user"]},
    )


async def move_up(connection: Connection, active: Sequence[tuple[str, str, int]]) -> None:
    """Move conversations with a user up in its list: tenant, id, and the time of the last item in ms.

    It costs half of recording them again.
    """
    with translated():
        await connection.execute(_SQL["move_up"], *zip(*active, strict=True))
