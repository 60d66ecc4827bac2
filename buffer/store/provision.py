"""Making the database on a server of our own."""

from __future__ import annotations

import asyncpg

from buffer.store.pool import translated

_SECONDS = 10.0


async def ensure_database(host: str, port: int, database: str, password: str | None, *, fresh: bool) -> None:
    """Make ``database`` if it is missing, and set the superuser's password if one is given.

    ``host`` may be a socket directory. ``fresh`` says that the database cannot be there yet.

    Raises:
        PostgresUnavailable, StoreRefused: Postgres did not do it.
    """
    with translated():
        try:
            connection = await _connect(host, port, "postgres" if fresh else database, password)
        except asyncpg.InvalidCatalogNameError:
            connection = await _connect(host, port, "postgres", password)
            fresh = True
        await _make(connection, database, password, fresh=fresh)


async def _make(
    connection: asyncpg.Connection[asyncpg.Record], database: str, password: str | None, *, fresh: bool
) -> None:
    try:
        if fresh:
            await connection.execute(f'CREATE DATABASE "{database}" STRATEGY wal_log')
        if password:
            literal = password.replace("'", "''")
            await connection.execute(f"ALTER ROLE postgres PASSWORD '{literal}'")
    finally:
        await connection.close(timeout=_SECONDS)


async def _connect(
    host: str, port: int, database: str, password: str | None
) -> asyncpg.Connection[asyncpg.Record]:
    return await asyncpg.connect(
        user="postgres",
        database=database,
        host=host,
        port=port,
        timeout=_SECONDS,
        command_timeout=_SECONDS,
        password=password or "none",  # or asyncpg looks for one in the user's files
        ssl=False,
    )
