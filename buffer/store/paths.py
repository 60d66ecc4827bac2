"""The path rows and the registry in Postgres: what the path protocol does there, one transaction a method.

See `buffer.path` for the protocol. Every change compares what the caller saw with what is there, under the
lock of the shards' rows, and does nothing where the path has moved on.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from datetime import datetime
from typing import Any, Literal, NamedTuple

from buffer.model.position import pack
from buffer.store import queries
from buffer.store.placing import Placed, place_acked, set_aside
from buffer.store.pool import Connection, Database, translated

_SQL = queries.load("paths")

Mode = Literal["stream", "closing", "direct"]

# A statement of the spill carries this much at the most.
_CHUNK_ROWS = 2_000
_CHUNK_BYTES = 8 << 20

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


class ManagedPath(NamedTuple):
    """One shard's path as its managers need it."""

    shard: int
    epoch: int
    mode: Mode
    run_id: str | None
    fence_mark: str | None
    flushed_through: int
    clean: bool


class Locked(NamedTuple):
    """A shard's row, locked until the transaction ends."""

    epoch: int
    mode: Mode
    next_direct: int
    flushed_through: int


class Process(NamedTuple):
    """An accepting process. ``confirmed`` has an epoch, or None, for each shard."""

    beats: int
    confirmed: list[int | None]


class Look(NamedTuple):
    """What a manager sees. ``again``: this manager was registered before."""

    again: bool
    looked_at: datetime
    paths: list[ManagedPath]
    processes: dict[str, Process]
    managers: dict[str, int]


class Judgement(NamedTuple):
    """Processes that a manager saw silent for a heartbeat time-out, with their number of beats."""

    manager: str
    looked_at: datetime
    valid_seconds: float
    silent: Mapping[str, int]


class Went(NamedTuple):
    """Shards that went back to the stream: their new epoch, and for whom the grant is."""

    epochs: dict[int, int]
    members: dict[int, list[str]]
    managers: list[str]


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


class _JudgedTooLateError(Exception):
    """Rolls a transaction back whose judgement does not count any more."""


class PathStore:
    """The path rows and the registry, for one process."""

    def __init__(self, database: Database) -> None:
        self._database = database

    # --- accepting processes

    async def heartbeat(
        self, process: str, window_seconds: float
    ) -> tuple[list[PathRow], list[int | None] | None]:
        """Say that the process lives; the path of every shard, and what it has confirmed, if registered."""
        async with self._database.connection() as connection:
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
        async with self._database.transaction() as connection:
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
                spilled[shard] = await _bring(connection, "count_spilled", shard, spill.get(shard, ()))
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
        async with self._database.transaction() as connection:
            rows = await lock(connection, seen)
            confirmed = await connection.fetchval(_SQL["registration"], process) or [None] * shards
            with translated():
                missing = {
                    r["shard"] for r in await connection.fetch(_SQL["missing_in"], process, list(seen))
                }
            registered = set()
            for shard, row in rows.items():
                if (row.epoch, row.mode) != (seen[shard].epoch, seen[shard].mode) or confirmed[
                    shard
                ] is not None:
                    continue
                if shard in missing:
                    await _bring(connection, "count_spilled", shard, retained.get(shard, ()))
                else:
                    await set_aside(connection, retained.get(shard, ()), _WRITTEN_OFF)
                confirmed[shard] = row.epoch
                registered.add(shard)
            if registered:
                await _register(connection, process, confirmed)
                await connection.execute(_SQL["found"], process, list(registered))
        return registered

    async def leave(self, process: str) -> None:
        """Unregister a process that acks nothing any more, and retains nothing."""
        async with self._database.connection() as connection:
            await connection.execute(_SQL["leave"], process)

    # --- managers

    async def look(self, manager: str, redis_seen_ago: float | None) -> Look:
        """Say that the manager lives, and when it saw Redis; everything that it needs to know."""
        async with self._database.transaction() as connection:
            me = await connection.fetchrow(_SQL["look"], manager, redis_seen_ago)
            assert me is not None
            paths = [
                ManagedPath(
                    r["shard"],
                    r["path_epoch"],
                    r["mode"],
                    r["run_id"],
                    r["fence_mark"],
                    r["flushed_through"],
                    r["clean"],
                )
                for r in await connection.fetch(_SQL["paths"])
            ]
            processes = {
                r["process"]: Process(r["beats"], r["confirmed"])
                for r in await connection.fetch(_SQL["processes"])
            }
            managers = {r["manager"]: r["looks"] for r in await connection.fetch(_SQL["managers"])}
        return Look(me["again"], me["looked_at"], paths, processes, managers)

    async def resign(self, manager: str) -> None:
        """Stop being a manager."""
        async with self._database.connection() as connection:
            await connection.execute(_SQL["resign"], manager)

    async def dismiss(self, manager: str, looks: int) -> bool:
        """Unregister another manager that was not seen for long; whether it had not come back."""
        async with self._database.connection() as connection:
            return await connection.fetchval(_SQL["dismiss"], manager, looks) is not None

    async def close(
        self, manager: str, seen: Mapping[int, int], why: str, *, unless_seen_seconds: float | None
    ) -> set[int]:
        """Stream to closing, in a new epoch; the shards that it worked for. ``seen``: shard to epoch.

        With ``unless_seen_seconds`` nothing is closed if another manager saw Redis within that time: then it
        is this manager alone that cannot reach it.
        """
        async with self._database.transaction() as connection:
            await lock(connection, seen)
            if unless_seen_seconds is not None and await connection.fetchval(
                _SQL["others_see_redis"], manager, unless_seen_seconds
            ):
                return set()
            rows = await connection.fetch(_SQL["close"], list(seen), list(seen.values()))
            closed = {r["shard"] for r in rows}
            if closed:
                await connection.execute(_SQL["add_incarnation"], "redis", f"shards {sorted(closed)}: {why}")
        return closed

    async def open_direct(
        self, judgement: Judgement, seen: Mapping[int, int]
    ) -> tuple[set[int], list[tuple[int, str]]]:
        """Closing to direct where nobody can ack in the old epoch any more; the shards, and who is missing.

        Everybody registered has confirmed, or was silent for a heartbeat time-out and still is: then what it
        may hold is missing, and the shard unclean.
        """
        try:
            return await self._open_direct(judgement, seen)
        except _JudgedTooLateError:
            return set(), []

    async def _open_direct(
        self, judgement: Judgement, seen: Mapping[int, int]
    ) -> tuple[set[int], list[tuple[int, str]]]:
        missing: list[tuple[int, str]] = []
        async with self._database.transaction() as connection:
            rows = await lock(connection, seen)
            ready = {s for s, row in rows.items() if (row.epoch, row.mode) == (seen[s], "closing")}
            late = await connection.fetch(_SQL["late"], list(ready))
            ready -= {r["shard"] for r in late if judgement.silent.get(r["process"]) != r["beats"]}
            given_up: dict[str, list[int | None]] = {}
            for row in late:
                if row["shard"] in ready:
                    missing.append((row["shard"], row["process"]))
                    given_up.setdefault(row["process"], row["confirmed"])[row["shard"]] = None
                    await connection.execute(_SQL["add_missing"], row["shard"], row["process"])
            for process, confirmed in given_up.items():
                await connection.execute(_SQL["set_confirmed"], process, confirmed)
            await connection.execute(_SQL["open_direct"], list(ready))
            # Last, so that little can happen between this and the commit.
            if missing and not await _may_judge(connection, judgement):
                raise _JudgedTooLateError
        return ready, missing

    async def unregister(
        self, judgement: Judgement, process: str, through: Mapping[int, tuple[int, int]]
    ) -> bool:
        """Forget a silent process that was put out of the grants; False while what it acked is unflushed.

        ``through``: shard to the epoch and the last position that Redis had given out when it was put out.
        """
        async with self._database.transaction() as connection:
            rows = await lock(connection, through)
            if not await _may_judge(connection, judgement):
                return False
            confirmed = await connection.fetchval(_SQL["registration"], process)
            if confirmed is None:
                return True
            for shard, (epoch, position) in through.items():
                row = rows[shard]
                if (row.epoch, row.mode) == (epoch, "stream") and row.flushed_through >= position:
                    confirmed[shard] = None
            beats = {r["process"]: r["beats"] for r in await connection.fetch(_SQL["processes"])}[process]
            if beats != judgement.silent.get(process):
                return True
            if any(epoch is not None for epoch in confirmed):
                await connection.execute(_SQL["set_confirmed"], process, confirmed)
                return False
            await connection.execute(_SQL["leave"], process)
        return True

    async def salvage(self, shard: int, epoch: int, rows: Sequence[Placed]) -> bool:
        """Bring what an older Redis held of an unclean shard; False if its path has moved on.

        Nothing is brought once nobody is missing any more: what Postgres does not have then was never acked,
        and complete reads were given without it.
        """
        async with self._database.transaction() as connection:
            row = (await lock(connection, [shard]))[shard]
            if (row.epoch, row.mode) != (epoch, "direct"):
                return False
            if not await connection.fetch(_SQL["missing"], [shard]):
                return True
            await _bring(connection, "count_salvaged", shard, rows)
        return True

    async def go_back(
        self,
        seen: Mapping[int, int],
        run_id: str,
        fences: Mapping[int, str],
        held_all: Collection[int],
        *,
        write_off_seconds: float,
        window_seconds: float,
    ) -> Went:
        """Direct to stream, in a new epoch, where nobody is missing any more.

        Call it after `salvage`. ``held_all``: shards of which this Redis held everything that was ever acked;
        nobody is missing there. Elsewhere the missing are written off after ``write_off_seconds``, and
        counted as a loss that may have happened.
        """
        async with self._database.transaction() as connection:
            rows = await lock(connection, seen)
            ready = {s for s, row in rows.items() if (row.epoch, row.mode) == (seen[s], "direct")}
            for row in await connection.fetch(_SQL["missing"], list(ready)):
                shard, process = row["shard"], row["process"]
                if shard not in held_all and row["seconds"] < write_off_seconds:
                    ready.discard(shard)
                    continue
                await connection.execute(_SQL["forget_missing"], shard, process)
                if shard not in held_all:
                    await _write_off(connection, row)
            order = sorted(ready)
            marks = [fences[shard] for shard in order]
            opened = await connection.fetch(_SQL["open_stream"], order, run_id, marks, window_seconds)
            epochs = {r["shard"]: r["path_epoch"] for r in opened}
            return await _grantees(connection, epochs)

    async def grantees(self, seen: Mapping[int, int]) -> Went:
        """For whom the grants of stream epochs are, where the path has not moved on."""
        async with self._database.transaction() as connection:
            rows = await lock(connection, seen)
            epochs = {s: row.epoch for s, row in rows.items() if (row.epoch, row.mode) == (seen[s], "stream")}
            return await _grantees(connection, epochs)

    async def went_back(self, shard: int, epoch: int, mark: int) -> tuple[int, int] | None:
        """Redis was told that everything up to ``mark`` is committed, and this Postgres does not have it.

        Counts the loss, once, and goes on after it: the first and last lost position; None if it is not so.
        """
        async with self._database.transaction() as connection:
            row = (await lock(connection, [shard]))[shard]
            before = max(row.flushed_through, pack(epoch, -1))
            last = pack(epoch, mark)
            if row.epoch != epoch or row.mode != "stream" or before >= last:
                return None
            detail = f"shard {shard}: Postgres had committed up to {last}, and now says {row.flushed_through}"
            await connection.execute(_SQL["add_incarnation"], "postgres", detail)
            await connection.execute(
                _SQL["add_loss"], shard, "postgres", last - before, before + 1, last, detail
            )
            await connection.execute(_SQL["mark_flushed"], shard, last)
        return before + 1, last

    async def catch_up(self, shard: int, seen_epoch: int, epoch: int, mark: int, run_id: str) -> bool:
        """Redis holds a grant of a later epoch than this Postgres knows: it was restored, or rolled back.

        Closes the path in an epoch after that one, and has what Redis holds salvaged. What Redis was told is
        committed may be lost: it is counted.
        """
        async with self._database.transaction() as connection:
            row = (await lock(connection, [shard]))[shard]
            if row.epoch != seen_epoch or row.epoch >= epoch:
                return False
            detail = f"shard {shard}: Redis was granted epoch {epoch}, and Postgres says {row.epoch}"
            await connection.execute(_SQL["add_incarnation"], "postgres", detail)
            if mark >= 0:
                first, last = pack(epoch, 0), pack(epoch, mark)
                await connection.execute(_SQL["add_loss"], shard, "postgres", mark + 1, first, last, detail)
            await connection.execute(_SQL["catch_up"], shard, epoch, run_id)
            await connection.execute(_SQL["add_missing"], shard, "a restored Postgres")
        return True


async def _grantees(connection: Connection, epochs: dict[int, int]) -> Went:
    members: dict[int, list[str]] = {shard: [] for shard in epochs}
    for row in await connection.fetch(_SQL["processes"]):
        for shard in epochs:
            if row["confirmed"][shard] is not None:
                members[shard].append(row["process"])
    managers = [r["manager"] for r in await connection.fetch(_SQL["managers"])]
    return Went(epochs, members, managers)


async def _write_off(connection: Connection, row: Any) -> None:
    """Numbers are dense: what was given out and is nowhere may have been acked by the missing."""
    gap = row["last_seen"] - row["through"] - row["placed_turns"]
    why = f"process {row['process']} never came back with what it may have held; {gap} numbers are nowhere"
    first, last = (row["through"] + 1, row["last_seen"]) if gap > 0 else (None, None)
    await connection.execute(_SQL["add_loss"], row["shard"], "suspected", max(1, gap), first, last, why)


async def _may_judge(connection: Connection, judgement: Judgement) -> bool:
    with translated():
        known = await connection.fetchval(
            _SQL["may_judge"], judgement.manager, judgement.looked_at, judgement.valid_seconds
        )
    return known is not None


async def _register(connection: Connection, process: str, confirmed: list[int | None]) -> None:
    with translated():
        await connection.execute(_SQL["register"], process, confirmed)


async def _bring(connection: Connection, count: str, shard: int, rows: Sequence[Placed]) -> int:
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
