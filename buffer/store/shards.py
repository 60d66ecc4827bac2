"""The shards' rows: ownership by lease, the fence, and the flushed-through mark."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import NamedTuple

from buffer.store import queries
from buffer.store.pool import Connection, Database, translated

_SQL = queries.load("shards")


class Owned(NamedTuple):
    """A shard that a flusher holds: its fence, path epoch and last committed position."""

    shard: int
    fence: int
    path_epoch: int
    flushed_through: int
    mode: str = "stream"


class Advance(NamedTuple):
    """What one flush moves a shard by."""

    shard: int
    fence: int
    path_epoch: int
    through: int
    turns: int


@dataclass(slots=True, frozen=True)
class ShardStatus:
    """One shard's row, for operators."""

    shard: int
    path_epoch: int
    mode: str
    clean: bool
    owner: str | None
    fence: int
    owned: bool
    flushed_through: int
    flushed_turns: int
    flushed_at: datetime | None


def application_name(flusher: str) -> str:
    """The name under which a flusher's connections show in ``pg_stat_activity`` (63 bytes at most)."""
    return f"buffer:{flusher}"[:63]


class ShardStore:
    """Reads and changes of ``buffer.shards`` outside a flush."""

    def __init__(self, database: Database) -> None:
        self._database = database

    async def status(self) -> list[ShardStatus]:
        """Every shard's row."""
        async with self._database.connection() as connection:
            return [ShardStatus(**r) for r in await connection.fetch(_SQL["status"])]

    async def hold(self, flusher: str, lease_seconds: float, shards: int) -> tuple[list[Owned], int]:
        """Heartbeat, renew, and claim up to a fair share; what is held now, and the fair share.

        Before a claim, transactions that an owner with an expired lease left open are ended.
        """
        async with self._database.transaction() as connection:
            live = await connection.fetchrow(_SQL["heartbeat"], flusher, lease_seconds)
            assert live is not None
            # Some get one more than others. Were it any of them, 4 shards could end as 2, 2 and 0.
            share, left_over = divmod(shards, live["others"] + 1)
            fair = share + (live["before"] < left_over)
            held = [Owned(*r) for r in await connection.fetch(_SQL["renew"], flusher, lease_seconds)]
            if len(held) < fair:
                expired = [r["owner"] for r in await connection.fetch(_SQL["expired_owners"])]
                if expired:
                    await connection.fetch(_SQL["end_transactions"], [application_name(o) for o in expired])
                claimed = await connection.fetch(_SQL["claim"], flusher, lease_seconds, fair - len(held))
                held += [Owned(*r) for r in claimed]
        return held, fair

    async def release(self, flusher: str, shards: Sequence[int]) -> None:
        """Hand shards back."""
        async with self._database.connection() as connection:
            await connection.execute(_SQL["release"], flusher, list(shards))

    async def leave(self, flusher: str) -> None:
        """Stop counting as a live flusher."""
        async with self._database.connection() as connection:
            await connection.execute(_SQL["leave"], flusher)


async def advance(
    connection: Connection, flusher: str, lease_seconds: float, moves: Sequence[Advance]
) -> set[int]:
    """The fence: move the marks of shards that are still ours; those that were."""
    with translated():
        rows = await connection.fetch(_SQL["advance"], flusher, lease_seconds, *zip(*moves, strict=True))
    return {r["shard"] for r in rows}
