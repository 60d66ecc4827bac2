"""Single items, and what happened in a conversation: reads that stand beside the tail."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import NamedTuple

from buffer.store import queries
from buffer.store.items import Slice, StoredItem, Where
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


@dataclass(slots=True, frozen=True)
class Happened:
    """What happened, oldest first, in the snapshot of a path. ``known`` as in `buffer.store.items.Slice`.

    Not ``clean``: a process is missing that may bring what happened before.
    """

    path: Slice
    clean: bool
    events: list[StoredEvent]


class LookupStore:
    """Reads of one conversation at a time."""

    def __init__(self, database: Database) -> None:
        self._database = database

    async def item(self, where: Where, item_id: str, pending_ids: Sequence[str]) -> Slice:
        """An item by its id, as a slice of one or none."""
        async with self._database.connection() as connection:
            row = await connection.fetchrow(
                _SQL["item"], where.tenant, where.conversation, item_id, where.shard, list(pending_ids)
            )
        assert row is not None
        found = row["position"] is not None
        return Slice(
            row["path_epoch"],
            row["mode"],
            row["flushed_through"],
            [StoredItem(row["position"], row["item_id"], row["created_at"], row["data"])] if found else [],
            frozenset(row["known"]),
            not row["incomplete"],
            None,
        )

    async def last(self, where: Where) -> Slice:
        """The last position at which anything happened, as a slice without items."""
        async with self._database.connection() as connection:
            row = await connection.fetchrow(_SQL["last"], where.tenant, where.conversation, where.shard)
        assert row is not None
        path = (row["path_epoch"], row["mode"], row["flushed_through"])
        return Slice(*path, [], frozenset(), complete=True, last_position=row["last"])

    async def history(
        self, where: Where, limit: int, pending_ids: Sequence[str], pending_erasure: int
    ) -> Happened:
        """The first ``limit`` things that happened after ``where.after``."""
        async with self._database.connection() as connection:
            rows = await connection.fetch(
                _SQL["history"],
                where.tenant,
                where.conversation,
                where.after,
                limit,
                where.shard,
                list(pending_ids),
                pending_erasure,
            )
        path = (rows[0]["path_epoch"], rows[0]["mode"], rows[0]["flushed_through"])
        known = frozenset(rows[0]["known"])
        return Happened(
            Slice(*path, [], known, complete=rows[0]["clean"], last_position=None),
            rows[0]["clean"],
            [
                StoredEvent(
                    r["kind"], r["position"], r["item_id"], r["removed_after"], r["created_at"], r["data"]
                )
                for r in rows
                if r["position"] is not None
            ],
        )
