"""Numbered migrations, applied in order under a lock: safe to run from many processes at once."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib.resources import files

from buffer.errors import PostgresUnavailable, SchemaMismatch, SettingsError
from buffer.store.pool import Connection, Database

# Any constant will do, as long as every release uses the same; this spells "buffer" in ASCII.
_LOCK = 0x627566666572


@dataclass(slots=True, frozen=True)
class Migration:
    """One file of ``migrations/``."""

    version: int
    name: str
    sql: str


def migrations() -> list[Migration]:
    """All migrations of this release, in order."""
    found = [
        Migration(int(file.name[:4]), file.name[5:-4], file.read_text("utf-8"))
        for file in files(__package__).joinpath("migrations").iterdir()
        if file.name.endswith(".sql")
    ]
    return sorted(found, key=lambda migration: migration.version)


async def migrate(
    database: Database, shards: int, on_applied: Callable[[Migration], None] = lambda _: None
) -> int:
    """Bring the schema up to this release and make ``shards`` shards; the schema's version.

    Raises:
        SettingsError: the database was set up with another number of shards.
    """
    async with database.transaction() as connection:
        await connection.execute("select pg_advisory_xact_lock($1)", _LOCK)
        await connection.execute("create schema if not exists buffer")
        await connection.execute(
            "create table if not exists buffer.migrations "
            "(version int primary key, name text not null, applied_at timestamptz not null default now())"
        )
        applied = {r["version"] for r in await connection.fetch("select version from buffer.migrations")}
        version = max(applied, default=0)
        for migration in migrations():
            if migration.version not in applied:
                await connection.execute(migration.sql)
                await connection.execute(
                    "insert into buffer.migrations (version, name) values ($1, $2)",
                    migration.version,
                    migration.name,
                )
                on_applied(migration)
                version = migration.version
        await _fix_shards(connection, shards)
    return version


async def _fix_shards(connection: Connection, shards: int) -> None:
    await connection.execute(
        "insert into buffer.meta (key, value) values ('shards', $1) on conflict do nothing", str(shards)
    )
    kept = int(await connection.fetchval("select value from buffer.meta where key = 'shards'"))
    if kept != shards:
        raise SettingsError(
            f"BUFFER_SHARDS is {shards}, but this database was set up with {kept}; "
            f"conversations would be looked for in the wrong shard. Set BUFFER_SHARDS={kept}"
        )
    await connection.execute(
        "insert into buffer.shards (shard) select generate_series(0, $1 - 1) on conflict do nothing", shards
    )


async def check_schema(database: Database, shards: int) -> int:
    """The schema's version, if this release can work with it.

    Raises:
        SchemaMismatch: migrations are missing; the message names the command.
        SettingsError: another number of shards.
        PostgresUnavailable: Postgres did not answer.
    """
    async with database.connection() as connection:
        version = await connection.fetchval(
            "select case when to_regclass('buffer.migrations') is null then 0 else 1 end"
        )
        if version:
            version = await connection.fetchval("select coalesce(max(version), 0) from buffer.migrations")
        wanted = migrations()[-1].version
        if version < wanted:
            raise SchemaMismatch(
                f"the database has schema version {version}, needed is {wanted}; run `buffer migrate`"
            )
        kept = await connection.fetchval("select value from buffer.meta where key = 'shards'")
    if kept is None:
        raise PostgresUnavailable("the database is being set up")
    if int(kept) != shards:
        raise SettingsError(f"BUFFER_SHARDS is {shards}, but this database was set up with {kept}")
    return int(version)
