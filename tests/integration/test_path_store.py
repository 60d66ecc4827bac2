"""The path rows and the registry in Postgres: each change compares, and is whole or not at all."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from datetime import UTC, datetime, timedelta

import asyncpg
import pytest

from buffer.errors import BufferError
from buffer.model.position import pack
from buffer.settings import Settings
from buffer.store.path_moves import Judgement, PathMoves
from buffer.store.paths import PathRow, lock
from buffer.store.placing import Placed
from buffer.store.pool import Database
from buffer.store.shards import Advance, ShardStore, advance
from tests.support.polling import eventually

SHARDS = 4
_WAITING = """
select count(*) from pg_stat_activity where wait_event_type = 'Lock' and datname = current_database()
"""
ALL = range(SHARDS)
STREAM = 2  # the first stream epoch of a fresh database
LATER = timedelta(seconds=60)


class Path:
    """A database whose path is the stream, at epoch 2, with process ``p`` and manager ``m``."""

    def __init__(self, database: Database, postgres: asyncpg.Connection) -> None:
        self.store = PathMoves(database)
        self.database = database
        self.postgres = postgres

    async def begin(self) -> None:
        await self.register("p", {})
        await self.store.look("m", None)
        went = await self.go_back(1)
        assert went == dict.fromkeys(ALL, STREAM)

    async def go_back(
        self, epoch: int, held_all: bool = False, write_off_seconds: float = 60
    ) -> dict[int, int]:
        went = await self.store.go_back(
            dict.fromkeys(ALL, epoch),
            "run",
            dict.fromkeys(ALL, f"fence {epoch}"),
            set(ALL) if held_all else set(),
            write_off_seconds=write_off_seconds,
            window_seconds=600,
        )
        return went.epochs

    async def close(self, epoch: int = STREAM, unless: float | None = None) -> set[int]:
        return await self.store.close("m", dict.fromkeys(ALL, epoch), "why", unless_seen_seconds=unless)

    async def rows(self) -> list[PathRow]:
        return (await self.store.heartbeat("", 600))[0]

    async def register(self, process: str, retained: dict[int, list[Placed]]) -> set[int]:
        seen = {row.shard: row for row in await self.rows()}
        return await self.store.register(process, seen, retained, SHARDS)

    async def confirm(self, epoch: int, spill: dict[int, list[Placed]], process: str = "p") -> dict[int, int]:
        return await self.store.confirm(process, dict.fromkeys(ALL, epoch), spill)

    async def judgement(self, *silent: str, ago: timedelta = timedelta(0)) -> Judgement:
        """Manager ``m`` has seen these stand still, at their number of beats of this moment."""
        look = await self.store.look("m", None)
        beats = {name: look.processes[name].beats for name in silent}
        return Judgement("m", look.looked_at - ago, 5.0, beats)

    async def open_direct(self, judgement: Judgement, epoch: int = STREAM + 1) -> set[int]:
        return (await self.store.open_direct(judgement, dict.fromkeys(ALL, epoch)))[0]

    async def lose(self, process: str = "p") -> None:
        """Close, and go direct without that process."""
        await self.close()
        assert await self.open_direct(await self.judgement(process)) == set(ALL)

    async def states(self) -> set[tuple[int, str, bool]]:
        return {(row.epoch, row.mode, row.clean) for row in await self.rows()}

    async def items(self) -> list[str]:
        rows = await self.postgres.fetch("select item_id from buffer.items order by position")
        return [row["item_id"] for row in rows]

    async def letters(self) -> list[str]:
        return [row["item_id"] for row in await self.postgres.fetch("select * from buffer.dead_letters")]

    async def confirmed(self, process: str = "p") -> list[int | None] | None:
        return (await self.store.heartbeat(process, 600))[1]


@pytest.fixture
async def path(settings: Settings, postgres: asyncpg.Connection) -> AsyncIterator[Path]:
    database = Database(settings, "test")
    await database.open()
    path = Path(database, postgres)
    await path.begin()
    yield path
    await database.close()


def acked(*numbers: int, epoch: int = STREAM) -> list[Placed]:
    at = datetime(2026, 3, 1, tzinfo=UTC)
    return [Placed("t", "c", pack(epoch, n), f"m-{epoch}-{n}", at, b"{}", None, None) for n in numbers]


# --- closing


async def test_path_closes_once_and_only_at_the_epoch_that_was_seen(path: Path) -> None:
    """Of managers who race, one succeeds; one that is late does nothing."""
    assert await path.close(STREAM - 1) == set()
    results = await asyncio.gather(path.close(), path.close())
    assert sorted(map(len, results)) == [0, SHARDS]
    assert await path.states() == {(STREAM + 1, "closing", True)}
    assert await path.close(STREAM + 1) == set()
    assert await path.postgres.fetchval("select count(*) from buffer.incarnations") == 1


async def test_path_closes_where_no_other_manager_saw_redis_lately(path: Path) -> None:
    """Its own sight does not count, nor one of long ago."""
    await path.store.look("m", 0.0)
    await path.store.look("other", 30.0)
    assert await path.close(unless=5.0) == set(ALL)


async def test_path_does_not_close_while_another_manager_sees_redis(path: Path) -> None:
    """It was seen within the time that is asked for."""
    await path.store.look("other", 1.0)
    assert await path.close(unless=5.0) == set()
    assert await path.states() == {(STREAM, "stream", True)}
    assert await path.close() == set(ALL), "without that condition it closes"


async def test_spill_and_confirmation_are_one(path: Path) -> None:
    """Where the spill fails nothing is confirmed; where it succeeds both are there."""
    await path.close()
    await path.postgres.execute("alter table buffer.items rename to elsewhere")
    with pytest.raises(BufferError):
        await path.confirm(STREAM + 1, {1: acked(0, 1)})
    assert await path.confirmed() == [1] * SHARDS
    await path.postgres.execute("alter table buffer.elsewhere rename to items")
    assert await path.confirm(STREAM + 1, {1: acked(0, 1)}) == {0: 0, 1: 2, 2: 0, 3: 0}
    assert await path.confirmed() == [STREAM + 1] * SHARDS
    assert await path.items() == ["m-2-0", "m-2-1"]
    assert await path.confirm(STREAM + 1, {1: acked(0, 1)}) == dict.fromkeys(ALL, 0), "its answer was lost"


async def test_confirmation_of_a_path_that_moved_on_does_nothing(path: Path) -> None:
    """Too early, too late, or by a process that is not registered any more: nothing is inserted."""
    assert await path.confirm(STREAM + 1, {0: acked(0)}) == {}
    await path.close()
    assert await path.confirm(STREAM, {0: acked(0)}) == {}
    assert await path.confirm(STREAM + 1, {0: acked(0)}, process="unknown") == {}
    await path.open_direct(await path.judgement("p"))
    assert await path.confirm(STREAM + 1, {0: acked(0)}) == {}
    assert await path.items() == []


# --- direct


async def test_direct_waits_for_everybody_who_is_registered(path: Path) -> None:
    """Until each has confirmed; then it is clean."""
    await path.register("q", {})
    await path.close()
    assert await path.open_direct(await path.judgement()) == set()
    await path.confirm(STREAM + 1, {})
    assert await path.open_direct(await path.judgement("p")) == set(), "q has not"
    await path.confirm(STREAM + 1, {}, process="q")
    assert await path.open_direct(await path.judgement()) == set(ALL)
    assert await path.states() == {(STREAM + 1, "direct", True)}


async def test_who_is_silent_is_given_up_and_missing(path: Path) -> None:
    """It is not registered any more, and the shards are not clean until it is back."""
    await path.lose()
    assert await path.states() == {(STREAM + 1, "direct", False)}
    assert await path.confirmed() == [None] * SHARDS


async def test_judgement_that_does_not_hold_any_more_changes_nothing(path: Path) -> None:
    """The process beat since; the manager looked too long ago; the manager is not registered."""
    await path.close()
    stale = await path.judgement("p")
    await path.store.heartbeat("p", 600)
    assert await path.open_direct(stale) == set()
    assert await path.open_direct(await path.judgement("p", ago=LATER)) == set()
    unknown = (await path.judgement("p"))._replace(manager="unknown")
    assert await path.open_direct(unknown) == set()
    assert await path.states() == {(STREAM + 1, "closing", True)}
    assert await path.confirmed() == [1] * SHARDS


async def test_giving_up_on_a_process_overwrites_nothing_that_it_confirmed_elsewhere(path: Path) -> None:
    """Shards may be in different modes: what is said of one leaves the others alone."""
    await path.store.close("m", {0: STREAM}, "why")
    judgement = await path.judgement("p")
    transaction = path.postgres.transaction()
    await transaction.start()
    await path.postgres.execute("update buffer.processes set confirmed[2] = 9 where process = 'p'")
    opening = asyncio.create_task(path.store.open_direct(judgement, {0: STREAM + 1}))
    await _waits(path, 1)
    await transaction.commit()
    assert (await opening)[0] == {0}
    assert await path.confirmed() == [None, 9, 1, 1]


# --- leaving


async def test_kicked_process_is_unregistered_once_all_before_is_flushed(path: Path) -> None:
    """Shard by shard, and not one entry earlier."""
    through = {0: (STREAM, pack(STREAM, 4)), **dict.fromkeys((1, 2, 3), (STREAM, 0))}
    flushed = "update buffer.shards set flushed_through = $1 where shard = 0"
    await path.postgres.execute(flushed, pack(STREAM, 3))
    assert not await path.store.unregister(await path.judgement("p"), "p", through)
    assert await path.postgres.fetchval("select confirmed from buffer.processes") == [1, None, None, None]
    await path.postgres.execute(flushed, pack(STREAM, 4))
    assert await path.store.unregister(await path.judgement("p"), "p", through)
    assert await path.confirmed() is None


async def test_process_that_is_back_is_not_unregistered(path: Path) -> None:
    """It beat between the judgement and the transaction; or the path closed, and it may have to spill."""
    through = dict.fromkeys(ALL, (STREAM, 0))
    judgement = await path.judgement("p")
    await path.store.heartbeat("p", 600)
    assert await path.store.unregister(judgement, "p", through)
    assert await path.confirmed() == [1] * SHARDS
    assert not await path.store.unregister(await path.judgement("p", ago=LATER), "p", through)
    await path.close()
    assert not await path.store.unregister(await path.judgement("p"), "p", through)
    assert await path.confirmed() == [1] * SHARDS


# --- coming back


async def test_missing_process_brings_what_it_holds(path: Path) -> None:
    """At its old positions; then nobody is missing any more."""
    await path.lose()
    assert await path.register("p", {2: acked(0, 1)}) == set(ALL)
    assert await path.items() == ["m-2-0", "m-2-1"]
    assert await path.states() == {(STREAM + 1, "direct", True)}
    assert await path.register("p", {2: acked(5)}) == set(), "it is registered"


async def test_process_that_was_written_off_brings_nothing_into_the_order(path: Path) -> None:
    """Complete reads were given without it: it is kept as a dead letter, and counted as suspected loss."""
    await path.lose()
    await path.postgres.execute("update buffer.shards set last_seen = $1 where shard = 2", pack(STREAM, 6))
    assert await path.go_back(STREAM + 1) == {}
    assert await path.go_back(STREAM + 1, write_off_seconds=0) == dict.fromkeys(ALL, STREAM + 2)
    losses = await path.postgres.fetch("select * from buffer.losses where shard = 2")
    assert [(r["kind"], r["turns"], r["last_position"]) for r in losses] == [
        ("suspected", 7, pack(STREAM, 6))
    ]
    assert await path.register("p", {2: acked(3)}) == set(ALL)
    assert await path.items() == []
    assert await path.letters() == ["m-2-3"]
    assert await path.states() == {(STREAM + 2, "stream", True)}


async def test_registration_by_an_older_look_does_nothing(path: Path) -> None:
    """The path has moved on since: what is older by then may be something else."""
    seen = {row.shard: row for row in await path.rows()}
    await path.lose()
    assert await path.store.register("p", seen, {0: acked(0)}, SHARDS) == set()
    assert await path.items() == []
    assert await path.states() == {(STREAM + 1, "direct", False)}


async def test_process_that_a_restored_postgres_does_not_know_brings_what_it_holds(path: Path) -> None:
    """Nobody wrote it off: Redis tells of an epoch that this Postgres has never heard of."""
    await path.postgres.execute("delete from buffer.processes")
    assert await path.store.catch_up(0, STREAM, 6, -1, "run")
    assert (7, "closing", False) in await path.states()
    await path.register("p", {0: acked(0, 1, epoch=6)})
    assert await path.items() == ["m-6-0", "m-6-1"]
    assert await path.letters() == []
    assert (7, "closing", False) in await path.states(), "what Redis holds is still to be salvaged"


# --- the return


async def test_path_goes_back_when_nobody_is_missing_or_redis_held_all(path: Path) -> None:
    """With the server and the fence that the grant will count over; a second manager does nothing."""
    await path.lose()
    assert await path.go_back(STREAM + 1) == {}
    assert await path.go_back(STREAM + 1, held_all=True) == dict.fromkeys(ALL, STREAM + 2)
    assert await path.go_back(STREAM + 1, held_all=True) == {}
    assert await path.states() == {(STREAM + 2, "stream", True)}
    marks = await path.postgres.fetch("select distinct run_id, fence_mark from buffer.shards")
    assert [tuple(r) for r in marks] == [("run", f"fence {STREAM + 1}")]
    assert await path.postgres.fetchval("select count(*) from buffer.losses") == 0


async def test_salvage_brings_only_while_somebody_is_missing(path: Path) -> None:
    """Once nobody is, what Postgres does not have was never acked, and complete reads went without it."""
    await path.lose()
    assert await path.store.salvage(1, STREAM + 1, acked(0))
    assert await path.items() == ["m-2-0"]
    await path.register("p", {})
    assert await path.store.salvage(1, STREAM + 1, acked(1))
    assert await path.items() == ["m-2-0"]
    assert not await path.store.salvage(1, STREAM, acked(2)), "the path has moved on"


# --- locks


async def test_flusher_renews_and_hands_back_in_the_order_in_which_others_lock(path: Path) -> None:
    """Rows stand in any order in the table; whoever waits for several never waits in a circle."""
    shards = ShardStore(path.database)
    await shards.hold("f", 5.0, SHARDS)
    for change in (lambda: shards.hold("f", 5.0, SHARDS), lambda: shards.release("f", list(ALL))):
        while await path.postgres.fetchval("select shard from buffer.shards") == 0:  # comes first
            await path.postgres.execute("update buffer.shards set flushed_turns = 0 where shard = 0")
        transaction = path.postgres.transaction()
        await transaction.start()
        await path.postgres.execute("select from buffer.shards where shard = 0 for update")
        first = asyncio.create_task(_lock_all(path.database))
        await _waits(path, 1)
        second = asyncio.create_task(change())
        await _waits(path, 2)
        await transaction.commit()
        async with asyncio.timeout(0.9):  # a deadlock is noticed after 1 s
            await asyncio.gather(first, second)


async def _lock_all(database: Database) -> None:
    async with database.transaction() as connection:
        await lock(connection, list(ALL))


async def _waits(path: Path, count: int) -> None:
    """So many wait for locks. Asked on another connection: a transaction sees one state of it."""

    async def found() -> bool:
        async with path.database.connection() as connection:
            return bool(await connection.fetchval(_WAITING) == count)

    await eventually(found, seconds=5, every_seconds=0.005)


async def test_flush_of_a_path_that_closes_does_not_wait_for_the_spill_that_waits_for_it(path: Path) -> None:
    """Both write the same item: the flush is refused at once, and the spill goes on."""
    shards = ShardStore(path.database)
    held, _ = await shards.hold("f", 5.0, SHARDS)
    async with path.database.connection() as connection:
        flush = connection.transaction()
        await flush.start()
        await connection.execute(
            "insert into buffer.items values ('t', 'c', $1, 'm-2-0', now(), '{}')", pack(STREAM, 0)
        )
        await path.close()
        spill = asyncio.create_task(path.confirm(STREAM + 1, {0: acked(0)}))
        await _waits(path, 1)
        moves = [Advance(o.shard, o.fence, o.path_epoch, pack(STREAM, 0), 1) for o in held]
        async with asyncio.timeout(0.9):  # a deadlock is noticed after 1 s
            assert await advance(connection, "f", 5.0, moves) == set()
        await flush.rollback()
    assert (await spill)[0] == 1
