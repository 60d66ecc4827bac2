"""Which epoch each shard is in, as far as this process knows.

The truth is in Postgres (`buffer.shards.path_epoch`); Redis holds a grant of the same epoch, and every
script refuses a caller of another one. A refusal is the signal to look again; nothing else on the append
or read path asks Postgres.
"""

from __future__ import annotations

import asyncio

from buffer.store.shards import ShardStore


class Path:
    """The epochs of all shards, refreshed on demand by one query at a time."""

    def __init__(self, store: ShardStore) -> None:
        self._store = store
        self._refreshing: asyncio.Task[None] | None = None
        self.epochs: list[int] = []

    async def refresh(self) -> None:
        """Read the epochs; concurrent callers share one query.

        Raises:
            PostgresUnavailable: Postgres did not answer; what was known stays.
        """
        if self._refreshing is None or self._refreshing.done():
            self._refreshing = asyncio.create_task(self._read(), name="path-refresh")
        await asyncio.shield(self._refreshing)

    async def _read(self) -> None:
        self.epochs = await self._store.epochs()
