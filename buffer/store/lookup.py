"""Single items, and what happened in a conversation: reads that stand beside the tail."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime
from typing import Any, NamedTuple

from buffer.store import queries
from buffer.store.items import StoredItem, Where
from buffer.store.pool import Database

_SQL = queries.load("lookup")


class StoredEvent(NamedTuple):
    """Something that happened at a position; ``kind`` as in `buffer.model.record`.

    ``removed_after``: items after that position are gone. ``data``: an appended item's JSON.
    """

    kind: str
    position: int
    item_id: str | None
    removed_after: int | None
    created_at: datetime | None
    data: str | None


class Found(NamedTuple):
    """One item, if it is there, in the snapshot of its shard's path; see `buffer.store.items.Slice`."""

    epoch: int
    mode: str
    flushed_through: int
    item: StoredItem | None
    known: frozenset[str]
    complete: bool


class Last(NamedTuple):
    """The last position at which anything happened, or 0, in the snapshot of its shard's path."""

    epoch: int
    mode: str
    flushed_through: int
    position: int


class Happened(NamedTuple):
    """What happened, oldest first, in the snapshot of its shard's path.

    Not ``clean``: a process is missing that may bring what happened before.
    """

    epoch: int
    mode: str
    flushed_through: int
    known: frozenset[str]
    clean: bool
    events: list[StoredEvent]


class LookupStore:
    """Reads of one conversation at a time."""

    def __init__(self, database: Database) -> None:
        self._database = database

    async def item(self, where: Where, item_id: str, pending_ids: Sequence[str]) -> Found:
        """An item by its id. ``pending_ids``: of what is unflushed."""
        async with self._database.connection() as connection:
            row = await connection.fetchrow(
                _SQL["item"], where.tenant, where.conversation, item_id, where.shard, list(pending_ids)
            )
        assert row is not None
        item = None
        if row["position"] is not None:
            item = StoredItem(row["position"], row["item_id"], row["created_at"], row["data"])
        return Found(*_path(row), item, frozenset(row["known"]), not row["incomplete"])

    async def last(self, where: Where) -> Last:
        """The last position at which anything happened."""
        async with self._database.connection() as connection:
            row = await connection.fetchrow(_SQL["last"], where.tenant, where.conversation, where.shard)
        assert row is not None
        return Last(*_path(row), row["last"])

    async def history(self, where: Where, limit: int, pending_ids: Sequence[str]) -> Happened:
        """The first ``limit`` things that happened after ``where.after``."""
        of = (where.tenant, where.conversation, where.after, limit, where.shard, list(pending_ids))
        async with self._database.connection() as connection:
            rows = await connection.fetch(_SQL["history"], *of)
        columns = ("kind", "position", "item_id", "removed_after", "created_at", "data")
        events = [StoredEvent(*(r[c] for c in columns)) for r in rows if r["position"] is not None]
        return Happened(*_path(rows[0]), frozenset(rows[0]["known"]), rows[0]["clean"], events)


def _path(row: Any) -> tuple[int, str, int]:
    return row["path_epoch"], row["mode"], row["flushed_through"]
