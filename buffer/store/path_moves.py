"""How managers move the path: one transaction a step, see `buffer.path` for the protocol.

A step compares what its manager saw with what is there, and does nothing where the path has moved on.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from datetime import datetime
from typing import Any, NamedTuple

from buffer.model.position import epoch_of, pack, sequence_of
from buffer.store import queries
from buffer.store.paths import RESTORED, Locked, Mode, PathStore, bring, lock
from buffer.store.placing import Placed
from buffer.store.pool import Connection, translated

_SQL = queries.load("paths")


class ManagedPath(NamedTuple):
    """One shard's path as its managers need it."""

    shard: int
    epoch: int
    mode: Mode
    run_id: str | None
    fence_mark: str | None
    flushed_through: int
    clean: bool


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


class _JudgedTooLateError(Exception):
    """Rolls a transaction back whose judgement does not count any more."""


class PathMoves(PathStore):
    """What managers do with the path rows and the registry."""

    async def look(self, manager: str, redis_seen_ago: float | None) -> Look:
        """Say that the manager lives, and when it saw Redis; everything that it needs to know."""
        async with self.database.transaction() as connection:
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
        async with self.database.connection() as connection:
            await connection.execute(_SQL["resign"], manager)

    async def dismiss(self, manager: str, looks: int) -> bool:
        """Unregister another manager that was not seen for long; whether it had not come back."""
        async with self.database.connection() as connection:
            return await connection.fetchval(_SQL["dismiss"], manager, looks) is not None

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
        async with self.database.transaction() as connection:
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
        async with self.database.transaction() as connection:
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
        async with self.database.transaction() as connection:
            row = (await lock(connection, [shard]))[shard]
            if (row.epoch, row.mode) != (epoch, "direct"):
                return False
            if not await connection.fetch(_SQL["missing"], [shard]):
                return True
            await bring(connection, "count_salvaged", shard, rows)
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
        async with self.database.transaction() as connection:
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
        async with self.database.transaction() as connection:
            rows = await lock(connection, seen)
            epochs = {s: row.epoch for s, row in rows.items() if (row.epoch, row.mode) == (seen[s], "stream")}
            return await _grantees(connection, epochs)

    async def went_back(self, shard: int, epoch: int, mark: int) -> tuple[int, int] | None:
        """Redis was told that everything up to ``mark`` is committed, and this Postgres does not have it.

        Counts the loss, once, and goes on after it: the first and last lost position; None if it is not so.
        """
        async with self.database.transaction() as connection:
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
        async with self.database.transaction() as connection:
            row = (await lock(connection, [shard]))[shard]
            if row.epoch != seen_epoch or row.epoch >= epoch:
                return False
            detail = f"shard {shard}: Redis was granted epoch {epoch}, and Postgres says {row.epoch}"
            await connection.execute(_SQL["add_incarnation"], "postgres", detail)
            if mark >= 0:
                first, last = pack(epoch, 0), pack(epoch, mark)
                await connection.execute(_SQL["add_loss"], shard, "postgres", mark + 1, first, last, detail)
            await connection.execute(_SQL["catch_up"], shard, epoch, run_id)
            await connection.execute(_SQL["add_missing"], shard, RESTORED)
        return True


async def move_past(connection: Connection, shard: int, row: Locked, through: int) -> None:
    """See to it that no position up to ``through`` is given out (again): Postgres was restored.

    The caller holds the shard's row locked. In the epoch of ``through`` itself Redis goes on after it, or is
    lost, which begins another epoch.
    """
    epoch = epoch_of(through)
    if row.epoch > epoch or (row.epoch, row.mode) == (epoch, "stream"):
        return
    with translated():
        if (row.epoch, row.mode) == (epoch, "direct"):
            await connection.execute(_SQL["go_on_after"], shard, sequence_of(through))
            return
        detail = f"shard {shard}: something was erased in epoch {epoch}, and Postgres says {row.epoch}"
        await connection.execute(_SQL["add_incarnation"], "postgres", detail)
        await connection.execute(_SQL["catch_up"], shard, epoch, None)
        await connection.execute(_SQL["add_missing"], shard, RESTORED)


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
