"""The path rows and the registry in Postgres: what the path protocol does there, one transaction a method.

See `buffer.path` for the protocol. Every change compares what the caller saw with what is there, under the
lock of the shards' rows, and does nothing where the path has moved on.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Literal, NamedTuple

from buffer.store import queries
from buffer.store.placing import Placed, place_acked, set_aside
from buffer.store.pool import Connection, Database, translated

_SQL = queries.load("paths")

Mode = Literal["stream", "closing", "direct"]

# A statement of the spill carries this much at the most.
_CHUNK_ROWS = 2_000
_CHUNK_BYTES = 8 << 20

# Who is missing where Postgres was restored, or rolled back: whoever it does not know any more.
RESTORED = "a restored Postgres"
_WRITTEN_OFF = "its process was written off before it came back; reads were complete without it"


class PathRow(NamedTuple):
    """One shard's path as an accepting process needs it.

    ``clean``: everything that was acked is where a reader can find it. ``ids_unknown_seconds``: for how long
    Redis will not know all ids of the idempotency window by itself.
    """

    shard: int
    epoch: int
    mode: Mode
    run_id: str | None
    clean: bool
    ids_unknown_seconds: float


class Locked(NamedTuple):
    """A shard's row, locked until the transaction ends."""

    epoch: int
    mode: Mode
    next_direct: int
    flushed_through: int


async def lock(connection: Connection, shards: Collection[int]) -> dict[int, Locked]:
    """Lock the rows of shards, in their order."""
    with translated():
        rows = await connection.fetch(_SQL["lock"], sorted(shards))
    return {
        r["shard"]: Locked(r["path_epoch"], r["mode"], r["next_direct"], r["flushed_through"]) for r in rows
    }


async def count_direct(connection: Connection, turns: Mapping[int, int]) -> None:
    """Count direct appends; their numbers are taken with it."""
    with translated():
        await connection.execute(_SQL["count_direct"], list(turns), list(turns.values()))


class PathStore:
    """The path rows and the registry, for one process."""

    def __init__(self, database: Database) -> None:
        self.database = database

    async def heartbeat(
        self, process: str, window_seconds: float
    ) -> tuple[list[PathRow], list[int | None] | None]:
        """Say that the process lives; the path of every shard, and what it has confirmed, if registered."""
        async with self.database.connection() as connection:
            rows = await connection.fetch(_SQL["heartbeat"], process)
        paths = [
            PathRow(
                r["shard"],
                r["path_epoch"],
                r["mode"],
                r["run_id"],
                r["clean"],
                min(window_seconds, r["ids_unknown_seconds"]),
            )
            for r in rows
        ]
        return paths, rows[0]["confirmed"] if rows else None

    async def confirm(
        self, process: str, epochs: Mapping[int, int], spill: Mapping[int, Sequence[Placed]]
    ) -> dict[int, int]:
        """Spill shards that are closing, and confirm their epoch; shard to how many rows were new.

        A shard that has moved on, or where the process is not registered any more, is left out.
        """
        async with self.database.transaction() as connection:
            rows = await lock(connection, epochs)
            confirmed = await connection.fetchval(_SQL["registration"], process)
            spilled: dict[int, int] = {}
            for shard, row in rows.items():
                if (
                    (row.epoch, row.mode) != (epochs[shard], "closing")
                    or not confirmed
                    or confirmed[shard] is None
                ):
                    continue
                spilled[shard] = await bring(connection, "count_spilled", shard, spill.get(shard, ()))
                confirmed[shard] = row.epoch
            if spilled:
                await _register(connection, process, confirmed)
        return spilled

    async def register(
        self, process: str, seen: Mapping[int, PathRow], retained: Mapping[int, Sequence[Placed]], shards: int
    ) -> set[int]:
        """Register with shards, and bring what is retained of older epochs; the shards that it worked for.

        What was written off while the process was away stays out of the conversation's order: complete reads
        were given without it. It is kept as dead letters.
        """
        async with self.database.transaction() as connection:
            rows = await lock(connection, seen)
            confirmed = await connection.fetchval(_SQL["registration"], process) or [None] * shards
            with translated():
                names = [process, RESTORED]
                missing = {r["shard"] for r in await connection.fetch(_SQL["missing_in"], names, list(seen))}
            registered = set()
            for shard, row in rows.items():
                if (row.epoch, row.mode) != (seen[shard].epoch, seen[shard].mode) or confirmed[
                    shard
                ] is not None:
                    continue
                if shard in missing:
                    await bring(connection, "count_spilled", shard, retained.get(shard, ()))
                else:
                    await set_aside(connection, retained.get(shard, ()), _WRITTEN_OFF)
                confirmed[shard] = row.epoch
                registered.add(shard)
            if registered:
                await _register(connection, process, confirmed)
                await connection.execute(_SQL["found"], process, list(registered))
        return registered

    async def is_clean(self) -> bool:
        """Whether nobody is missing who may hold acked items."""
        async with self.database.connection() as connection:
            clean: bool = await connection.fetchval(_SQL["is_clean"])
        return clean

    async def leave(self, process: str) -> None:
        """Unregister a process that acks nothing any more, and retains nothing."""
        async with self.database.connection() as connection:
            await connection.execute(_SQL["leave"], process)

    async def close(
        self,
        manager: str,
        seen: Mapping[int, int],
        why: str,
        *,
        last: Mapping[int, int] | None = None,
        unless_seen_seconds: float | None = None,
    ) -> set[int]:
        """Stream to closing, in a new epoch; the shards that it worked for. ``seen``: shard to epoch.

        ``last``: shard to the last position that is known to have been given out.

        With ``unless_seen_seconds`` nothing is closed if another manager saw Redis within that time: then it
        is this manager alone that cannot reach it.
        """
        async with self.database.transaction() as connection:
            await lock(connection, seen)
            if unless_seen_seconds is not None and await connection.fetchval(
                _SQL["others_see_redis"], manager, unless_seen_seconds
            ):
                return set()
            known = [(last or {}).get(shard, 0) for shard in seen]
            rows = await connection.fetch(_SQL["close"], list(seen), list(seen.values()), known)
            closed = {r["shard"] for r in rows}
            if closed:
                await connection.execute(_SQL["add_incarnation"], "redis", f"shards {sorted(closed)}: {why}")
        return closed


async def _register(connection: Connection, process: str, confirmed: list[int | None]) -> None:
    with translated():
        await connection.execute(_SQL["register"], process, confirmed)


async def bring(connection: Connection, count: str, shard: int, rows: Sequence[Placed]) -> int:
    """Place what was acked in an older epoch, and count it; how many rows were new."""
    new = at = 0
    while at < len(rows):
        end, nbytes = at, 0
        while end < len(rows) and end - at < _CHUNK_ROWS and nbytes < _CHUNK_BYTES:
            nbytes += len(rows[end].data)
            end += 1
        new += await place_acked(connection, rows[at:end])
        at = end
    if rows:
        with translated():
            await connection.execute(_SQL[count], shard, new, max(row.position for row in rows))
    return new
