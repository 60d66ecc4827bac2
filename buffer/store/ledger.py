"""The ledger of losses: what was lost or may be, kept in Postgres so that the count outlives processes."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime

from buffer.store import queries
from buffer.store.pool import Database

_SQL = queries.load("paths")


@dataclass(slots=True, frozen=True)
class Totals:
    """Counts over all shards. ``missing``: silent processes that may hold acked items."""

    lost_turns: int
    redis_incarnations: int
    postgres_incarnations: int
    dead_letters: int
    missing: int
    processes: int
    flushed_turns: int
    direct_turns: int
    spilled_turns: int
    salvaged_turns: int


@dataclass(slots=True, frozen=True)
class Loss:
    """Turns of a shard that were lost (``kind`` names the store) or may be (``suspected``)."""

    shard: int
    kind: str
    turns: int
    first_position: int | None
    last_position: int | None
    detail: str
    at: datetime


@dataclass(slots=True, frozen=True)
class Incarnation:
    """A store was found to be another one, or an older one, than before."""

    store: str
    detail: str
    at: datetime


class LossLedger:
    """Reads of the ledger."""

    def __init__(self, database: Database) -> None:
        self._database = database

    async def totals(self) -> Totals:
        """All counts."""
        async with self._database.connection() as connection:
            row = await connection.fetchrow(_SQL["audit"])
        assert row is not None
        return Totals(**row)

    async def losses(self, limit: int = 10) -> list[Loss]:
        """The newest losses, newest first."""
        async with self._database.connection() as connection:
            return [Loss(**row) for row in await connection.fetch(_SQL["losses"], limit)]

    async def incarnations(self, limit: int = 10) -> list[Incarnation]:
        """The newest changes of a store, newest first."""
        async with self._database.connection() as connection:
            return [Incarnation(**row) for row in await connection.fetch(_SQL["incarnations"], limit)]
