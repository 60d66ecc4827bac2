"""Flushing: when, what, by whom, and what happens to what cannot be flushed."""

from __future__ import annotations

import asyncio
import json
import signal
import time
from collections.abc import Callable
from typing import Any

import asyncpg
import pytest
from redis.asyncio import Redis

from buffer import Buffer, Conflict, OutcomeUnknown, SchemaMismatch, Settings, SettingsError
from tests.support.ledger import Ledger, in_postgres, in_reads
from tests.support.load import under_load
from tests.support.paths import on_path
from tests.support.polling import eventually
from tests.support.processes import Command, Commands

_OWNERS = "select owner from buffer.shards where lease_until > now() and owner is not null"


async def _rows(postgres: asyncpg.Connection) -> int:
    return int(await postgres.fetchval("select count(*) from buffer.items"))


async def _turns(buffer: Buffer) -> int:
    return sum(backlog.turns for backlog in await buffer.runtime.shards.peek(range(buffer.settings.shards)))


def _one_shard(buffer: Buffer, count: int) -> list[str]:
    """Conversations that live in shard 0."""
    names = (f"c{number}" for number in range(10_000))
    found = (name for name in names if buffer.conversation(name)._target.shard == 0)
    return [next(found) for _ in range(count)]


# --- when


@pytest.mark.parametrize(
    ("trigger", "limits"),
    [
        ("age", {"flush_interval_seconds": 0.2}),
        ("count", {"flush_max_turns": 10}),
        ("bytes", {"flush_max_bytes": 10_000}),
    ],
)
async def test_flush_comes_by_age_count_or_bytes(
    settings: Settings, postgres: asyncpg.Connection, trigger: str, limits: dict[str, Any]
) -> None:
    """Each limit alone makes the flush due, unasked; below it nothing is."""
    limited = settings.model_copy(update={"flush_interval_seconds": 60.0, **limits})
    async with Buffer.connect(limited, flusher=True) as buffer:
        conversation = buffer.conversation("c")
        for number in range(9):
            await conversation.append({"n": number, "x": "x" * 900})
        if trigger != "age":
            assert await _rows(postgres) == 0
        for number in range(9, 12):
            await conversation.append({"n": number, "x": "x" * 900})
        await eventually(lambda: _rows(postgres), seconds=5)


async def test_flush_waits_for_its_interval(settings: Settings, postgres: asyncpg.Connection) -> None:
    """An item alone is not flushed at once, and not later than the interval and a few ticks."""
    slow = settings.model_copy(update={"flush_interval_seconds": 0.5})
    async with Buffer.connect(slow, flusher=True) as buffer:
        began = time.monotonic()
        await buffer.conversation("c").append({})
        await eventually(lambda: _rows(postgres))
        assert 0.4 < time.monotonic() - began < 3


async def test_flushed_asks_for_a_flush_and_returns_with_the_row(
    patient: Buffer, postgres: asyncpg.Connection
) -> None:
    """However long the interval is; and at once where it is flushed already."""
    conversation = patient.conversation("c")
    receipt = await conversation.append({})
    await conversation.flushed(receipt, timeout=5)
    assert await _rows(postgres) == 1
    await conversation.flushed(receipt, timeout=0.05)


async def test_flushed_without_a_flusher_is_unknown_within_its_time(settings: Settings) -> None:
    """It names the item, and that it is buffered."""
    async with Buffer.connect(settings, flusher=True):
        pass
    async with Buffer.connect(settings) as buffer:
        conversation = buffer.conversation("c")
        receipt = await conversation.append({})
        with pytest.raises(OutcomeUnknown) as caught:
            await conversation.flushed(receipt, timeout=0.2)
        assert (caught.value.ids, caught.value.level) == ([receipt.id], "buffered")


async def test_wait_for_a_flush_survives_a_lost_nudge(settings: Settings) -> None:
    """Who asked before there was a flusher is served by the one that comes, however long its interval."""
    async with Buffer.connect(settings, flusher=True):
        pass
    slow = settings.model_copy(update={"flush_interval_seconds": 60.0})
    async with Buffer.connect(slow) as client:
        receipt = await client.conversation("c").append({})
        waiting = asyncio.create_task(client.conversation("c").flushed(receipt, timeout=10))
        await eventually(lambda: client.runtime.marks._waiters[client.conversation("c")._target.shard])
        async with Buffer.connect(slow, flusher=True):
            await waiting


# --- what


async def test_batch_is_never_split_in_postgres(settings: Settings, postgres: asyncpg.Connection) -> None:
    """However small the flusher's limits are, every snapshot holds whole appends only."""
    tiny = settings.model_copy(
        update={"flush_interval_seconds": 0.005, "flush_max_turns": 3, "flush_max_bytes": 1_024}
    )
    async with Buffer.connect(tiny, flusher=True) as buffer:

        async def append(name: str) -> None:
            for number in range(12):
                await buffer.conversation(name).extend([{"batch": number, "x": "x" * 90}] * 7)

        writing = asyncio.gather(*(append(f"c{number}") for number in range(8)))
        partly = 0
        while await _rows(postgres) < 8 * 12 * 7:
            rows = await postgres.fetch(
                "select count(*) as n from buffer.items group by conversation, data->>'batch'"
            )
            assert all(row["n"] == 7 for row in rows)
            partly += 0 < len(rows) < 8 * 12
        await writing
    assert partly, "never looked in the middle"


async def test_conversations_and_users_are_recorded_once(
    patient: Buffer, postgres: asyncpg.Connection
) -> None:
    """A user that becomes known later is added; one that is known is not changed."""
    await patient.conversation("c").append({})
    await patient.conversation("d", user="u1").append({})
    await patient.flush()
    await patient.conversation("c", user="u2").append({})
    await patient.conversation("d", user="u3").append({})
    await patient.conversation("d").append({})
    await patient.flush()
    rows = await postgres.fetch(
        "select conversation, user_id, created_at from buffer.conversations order by 1"
    )
    assert [(row["conversation"], row["user_id"]) for row in rows] == [("c", "u2"), ("d", "u1")]
    first = await postgres.fetchval("select min(created_at) from buffer.items where conversation = 'c'")
    assert rows[0]["created_at"] == first


async def test_settled_items_leave_redis(patient: Buffer, redis: Redis) -> None:
    """After a flush: empty streams, no bytes, no tails; the group shows no lag; the window remembers."""
    await asyncio.gather(*(patient.conversation(f"c{i}").append({"n": i}) for i in range(1_200)))
    await patient.flush()
    for shard, backlog in enumerate(await patient.runtime.shards.peek(range(patient.settings.shards))):
        assert (backlog.turns, backlog.bytes, backlog.oldest_ms) == (0, 0, None)
        keys = patient.runtime.shards.keys[shard]
        fields = {key.decode() for key in await redis.hkeys(keys.shard)}
        assert not {field for field in fields if "/" in field}
        (group,) = await redis.xinfo_groups(keys.stream)
        assert (group["pending"], group["lag"]) == (0, 0)
        assert await redis.hlen(keys.ids) > 0


# --- repeats after the window


async def _forget(buffer: Buffer, window_seconds: float = 0.0) -> None:
    """Rotate every shard's idempotency window twice: what is flushed is forgotten."""
    for _ in range(2):
        for shard in range(buffer.settings.shards):
            (backlog,) = await buffer.runtime.shards.peek([shard])
            assert backlog.epoch is not None
            await buffer.runtime.shards.rotate(shard, backlog.epoch, window_seconds)


async def test_late_equal_repeat_is_stored_once(patient: Buffer, postgres: asyncpg.Connection) -> None:
    """Beyond the window a repeat is acked anew; Postgres keeps the first, and reads show it once."""
    conversation = patient.conversation("c")
    first = await conversation.append({"a": 1, "b": 2}, id="m-1", durability="stored")
    await _forget(patient)
    again = await conversation.append({"b": 2, "a": 1}, id="m-1")
    assert (again.duplicate, again.position > first.position) == (False, True)
    for _ in range(2):
        assert [(i.id, i.position) for i in (await conversation.items()).items] == [("m-1", first.position)]
        assert [i.id for i in (await conversation.context(1)).items] == ["m-1"]
        await patient.flush()
    assert await _rows(postgres) == 1
    assert await postgres.fetchval("select count(*) from buffer.dead_letters") == 0
    assert patient.runtime.metrics["repeated_turns_total"]._value.get() == 1


async def test_late_repeat_of_a_replacement_removes_nothing(
    patient: Buffer, postgres: asyncpg.Connection
) -> None:
    """The replacement acted once; repeated after the window it leaves alone what came after it."""
    conversation = patient.conversation("c")
    await conversation.extend([{"n": 1}, {"n": 2}], ids=["a", "b"])
    await conversation.append({"n": 3}, id="b2", replace_after="a")
    await conversation.append({"n": 4}, id="c")
    await patient.flush()
    await _forget(patient)
    await conversation.append({"n": 3}, id="b2", replace_after="a")
    await conversation.append({"n": 5}, id="d")
    for _ in range(2):
        assert [item.id for item in (await conversation.items()).items] == ["a", "b2", "c", "d"]
        assert [item.id for item in (await conversation.context(2)).items] == ["c", "d"]
        assert [item.id for item in (await conversation.items(after="b2")).items] == ["c", "d"]
        await patient.flush()
    assert await postgres.fetchval("select count(*) from buffer.dead_letters") == 0


async def test_late_unequal_repeat_is_dead_lettered_and_counted(
    patient: Buffer, postgres: asyncpg.Connection
) -> None:
    """The first body stays; the second is kept with its payload and the reason; its batch goes on."""
    conversation = patient.conversation("c")
    await conversation.append({"n": 1}, id="m-1", durability="stored")
    await _forget(patient)
    await conversation.extend([{"n": 2}, {"n": 3}], ids=["m-1", "m-2"], durability="stored")
    assert [dict(item) for item in (await conversation.items()).items] == [{"n": 1}, {"n": 3}]
    (letter,) = await postgres.fetch("select * from buffer.dead_letters")
    assert (letter["conversation"], letter["item_id"]) == ("c", "m-1")
    assert json.loads(letter["payload"]) == {"n": 2}
    assert "another body" in letter["reason"]
    assert patient.runtime.metrics["dead_lettered_turns_total"]._value.get() == 1


async def test_id_of_a_removed_item_is_not_used_again(patient: Buffer, postgres: asyncpg.Connection) -> None:
    """Even long after: what comes under it is dead-lettered."""
    conversation = patient.conversation("c")
    await conversation.extend([{"n": 1}, {"n": 2}], ids=["a", "b"])
    await conversation.append({"n": 3}, id="c", replace_after="a", durability="stored")
    await _forget(patient)
    await conversation.append({"n": 2}, id="b", durability="stored")
    assert [item.id for item in (await conversation.items()).items] == ["a", "c"]
    assert "removed" in await postgres.fetchval("select reason from buffer.dead_letters")


async def test_window_is_rotated_by_the_flusher_when_its_time_has_passed(
    settings: Settings, redis: Redis
) -> None:
    """With a window of one second, a flushed id is forgotten after a few seconds of traffic."""
    short = settings.model_copy(update={"idempotency_window_seconds": 1.0})
    async with Buffer.connect(short, flusher=True) as buffer:
        (name,) = _one_shard(buffer, 1)
        conversation = buffer.conversation(name)
        await conversation.append({}, id="m-1", durability="stored")
        assert (await conversation.append({}, id="m-1")).duplicate

        async def forgotten() -> bool:
            await conversation.append({}, durability="stored")
            keys = buffer.runtime.shards.keys[0]
            return await redis.hlen(keys.ids) + await redis.hlen(keys.ids_old) < appended()

        count = 1

        def appended() -> int:
            nonlocal count
            count += 1
            return count

        await eventually(forgotten, seconds=10, every_seconds=0.1)
        assert not (await conversation.append({}, id="m-1")).duplicate


async def test_rotation_never_forgets_an_unflushed_id(patient: Buffer) -> None:
    """However often the window rotates, a repeat of an unflushed item gets its first receipt."""
    conversation = patient.conversation("c")
    first = await conversation.append({"n": 1}, id="m-1")
    await _forget(patient)
    await conversation.append({"n": 2}, id="m-2")
    await _forget(patient)
    again = await conversation.append({"n": 1}, id="m-1")
    assert (again.duplicate, again.position) == (True, first.position)
    with pytest.raises(Conflict):
        await conversation.append({"n": 7}, id="m-2")


# --- by whom


async def _shares(postgres: asyncpg.Connection) -> list[int]:
    owners = [row["owner"] for row in await postgres.fetch(_OWNERS)]
    return sorted(owners.count(owner) for owner in set(owners))


async def test_flushers_share_shards_fairly_and_take_over_from_a_killed_one(
    settings: Settings, postgres: asyncpg.Connection, commands: Commands
) -> None:
    """Four shards among three flushers, then two after SIGKILL: within a few seconds nothing waits."""
    flushers = [commands.flusher(settings) for _ in range(3)]
    await eventually(lambda: _settled_on(postgres, [[1, 1, 2]]))
    async with Buffer.connect(settings) as client:
        await on_path(client, "stream")
        async with under_load(client, writers=8, pause_seconds=0.005) as load:
            await eventually(lambda: load.acked > 200)
            flushers[0].kill()
            began = time.monotonic()
            await eventually(lambda: _settled_on(postgres, [[2, 2]], [flushers[0]]))
            assert time.monotonic() - began < 6
        await client.flush()
        assert not load.ledger.faults(await in_reads(client, load.ledger.conversations))
    assert not load.ledger.faults(await in_postgres(postgres))
    assert all(flusher.exit_code is None for flusher in flushers[1:])


async def _settled_on(
    postgres: asyncpg.Connection, shares: list[list[int]], dead: list[Command] | None = None
) -> bool:
    owners = [row["owner"] for row in await postgres.fetch(_OWNERS)]
    of_dead = any(f"-{flusher.pid}-" in owner for flusher in dead or [] for owner in owners)
    return await _shares(postgres) in shares and not of_dead


async def test_sigterm_flushes_once_more_and_hands_the_shards_over(
    settings: Settings, postgres: asyncpg.Connection, commands: Commands
) -> None:
    """What waited is in Postgres, the shards are free at once, and the exit code is 0."""
    slow = settings.model_copy(update={"flush_interval_seconds": 60.0, "lease_seconds": 30.0})
    flusher = commands.flusher(slow)
    async with Buffer.connect(slow) as client:
        await on_path(client, "stream")
        ledger = Ledger()
        for number in range(200):
            body = {"n": number}
            ledger.ack("c", await client.conversation("c").append(body), body)
        flusher.send(signal.SIGTERM)
        assert await eventually(lambda: flusher.exit_code is not None)
        assert flusher.exit_code == 0, flusher.text
        assert not await postgres.fetch(_OWNERS)
        assert await postgres.fetchval("select count(*) from buffer.flushers") == 0
        assert await _turns(client) == 0
    assert not ledger.faults(await in_postgres(postgres))


# --- what holds a shard


HEADERS = [
    b"2/i/default/c/m-new/u/1732368000123/////",
    b"2/something/else/altogether/with/more/parts/x",
    b"2",
    b"\xff\xfe not text",
    b"1/q/default/c/m-new//1732368000123////",
]


@pytest.mark.parametrize("header", HEADERS)
async def test_newer_record_format_holds_its_shard_and_dead_letters_nothing(
    patient: Buffer, postgres: asyncpg.Connection, redis: Redis, header: bytes
) -> None:
    """The shard waits, says so and keeps everything; the others go on; the flusher lives."""
    (held,) = _one_shard(patient, 1)
    free = next(n for n in map(str, range(100)) if patient.conversation(n)._target.shard != 0)
    (backlog,) = await patient.runtime.shards.peek([0])
    stream = patient.runtime.shards.keys[0].stream
    await redis.xadd(stream, {"h": header, "d": b"{}"}, id=f"{backlog.epoch}-*")
    behind = await patient.conversation(held).append({"n": 1})
    await patient.conversation(free).append({"n": 2}, durability="stored", timeout=10)
    with pytest.raises(OutcomeUnknown):
        await patient.conversation(held).flushed(behind, timeout=0.5)
    assert await postgres.fetchval("select count(*) from buffer.dead_letters") == 0
    assert await redis.xlen(stream) == 2
    assert patient.runtime.metrics["flush_failures_total"].labels(reason="format")._value.get() >= 1
    assert [dict(item) for item in (await patient.conversation(held).items()).items] == [{"n": 1}]
    await patient.conversation(free).append({"n": 3}, durability="stored", timeout=10)


_BREAKAGES = {
    "missing table": ("alter table buffer.items rename to away", "alter table buffer.away rename to items"),
    "missing conversations": (
        "alter table buffer.conversations rename to away",
        "alter table buffer.away rename to conversations",
    ),
    "missing column": (
        "alter table buffer.items rename column data to away",
        "alter table buffer.items rename column away to data",
    ),
    "refused by a trigger": (
        (
            "create function refuse() returns trigger language plpgsql as $$ begin raise 'no'; end $$; "
            "create trigger refuse before insert on buffer.items execute function refuse()"
        ),
        "drop trigger refuse on buffer.items",
    ),
}


@pytest.mark.parametrize("what", _BREAKAGES)
async def test_broken_database_holds_everything_until_it_is_repaired(
    buffer: Buffer, postgres: asyncpg.Connection, what: str
) -> None:
    """Appends go on, the failures are counted, nothing is dropped; after the repair all drains."""
    broken, repaired = _BREAKAGES[what]
    await postgres.execute(broken)
    failures = buffer.runtime.metrics["flush_failures_total"]
    async with under_load(buffer, writers=4, pause_seconds=0.01) as load:
        await eventually(lambda: _count(failures) >= 2)
        acked = load.acked
        assert await _turns(buffer) >= acked
        await postgres.execute(repaired)
    await buffer.flush()
    assert not load.ledger.faults(await in_postgres(postgres))
    assert await postgres.fetchval("select count(*) from buffer.dead_letters") == 0


def _count(metric: Any) -> float:
    samples = [sample for family in metric.collect() for sample in family.samples]
    return sum(sample.value for sample in samples if sample.name.endswith("_total"))


async def test_revoked_permission_holds_everything_until_it_is_granted(
    settings: Settings, postgres: asyncpg.Connection
) -> None:
    """The same for a user that may not write: nothing is dead-lettered."""
    role = f"role_{settings.key_prefix}"
    await postgres.execute(
        f"create role {role} login; grant usage on schema buffer to {role};"
        f"grant all on all tables in schema buffer to {role}; grant pg_signal_backend to {role}"
    )
    url = settings.postgres_url.replace("postgres@", f"{role}@")
    async with Buffer.connect(settings, postgres=url, flusher=True) as buffer:
        await postgres.execute(f"revoke insert on buffer.items from {role}")
        await asyncio.gather(*(buffer.conversation("c").append({"n": i}) for i in range(50)))
        await eventually(lambda: _count(buffer.runtime.metrics["flush_failures_total"]) >= 2)
        assert await _rows(postgres) == 0
        assert len((await buffer.conversation("c").items()).items) == 50
        await postgres.execute(f"grant insert on buffer.items to {role}")
        await buffer.flush()
        assert await _rows(postgres) == 50
        assert await postgres.fetchval("select count(*) from buffer.dead_letters") == 0


# --- the schema


async def test_migrate_from_many_processes_at_once_applies_each_migration_once(
    settings: Settings, postgres: asyncpg.Connection, commands: Commands
) -> None:
    """Eight start together on an empty database: all succeed, one of them did the work."""
    await postgres.execute("drop schema buffer cascade")
    children = [commands.start(settings, "-m", "buffer", "migrate") for _ in range(8)]
    await eventually(lambda: all(child.exit_code is not None for child in children), seconds=60)
    assert [child.exit_code for child in children] == [0] * 8, [child.text for child in children]
    assert sum("applied 0001_main" in child.text for child in children) == 1
    rows = await postgres.fetch("select version from buffer.migrations order by 1")
    assert [row["version"] for row in rows] == list(range(1, len(rows) + 1))
    assert await postgres.fetchval("select count(*) from buffer.shards") == settings.shards


async def test_another_number_of_shards_is_refused(settings: Settings, commands: Commands) -> None:
    """By the library and by the commands, with both numbers in the message."""
    wrong = settings.model_copy(update={"shards": settings.shards + 1})
    with pytest.raises(SettingsError, match=rf"{wrong.shards}.*{settings.shards}"):
        async with Buffer.connect(wrong):
            pass
    refused: list[Callable[[], Command]] = [
        lambda: commands.start(wrong, "-m", "buffer", "migrate"),
        lambda: commands.flusher(wrong),
    ]
    for start in refused:
        child = start()
        await eventually(lambda child=child: child.exit_code is not None)
        assert child.exit_code == 2, child.text
        assert "BUFFER_SHARDS" in child.text


async def test_database_without_the_schema_names_the_command(
    settings: Settings, postgres: asyncpg.Connection, commands: Commands
) -> None:
    """The library raises it; a flusher waits for it and begins by itself."""
    await postgres.execute("drop schema buffer cascade")
    with pytest.raises(SchemaMismatch, match="buffer migrate"):
        async with Buffer.connect(settings):
            pass
    flusher = commands.flusher(settings)
    await eventually(lambda: "buffer migrate" in flusher.text)
    assert flusher.exit_code is None
    migration = commands.start(settings, "-m", "buffer", "migrate")
    await eventually(lambda: migration.exit_code is not None)
    await eventually(lambda: postgres.fetch(_OWNERS))
