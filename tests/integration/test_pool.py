"""Connections to Postgres when it stops answering."""

from __future__ import annotations

import asyncio
from pathlib import Path
from urllib.parse import unquote

import pytest

from buffer.errors import PostgresUnavailable
from buffer.settings import Settings
from buffer.store.pool import Database
from tests.support.proxy import Proxy, proxied


async def _ask_and_stall(database: Database, kind: str, proxy: Proxy) -> None:
    async with asyncio.timeout(0.9), getattr(database, kind)() as connection:
        await connection.fetchval("select 1")
        proxy.stall()
        await connection.fetchval("select 2")


@pytest.mark.parametrize("kind", ["transaction", "connection"])
async def test_statement_that_gets_no_answer_is_given_up_with_its_connection(
    settings: Settings, kind: str
) -> None:
    """After its time-out once, not once more for a rollback; and the next one gets a new connection."""
    directory = unquote(settings.postgres_url.partition("?host=")[2])
    async with proxied(Path(directory) / ".s.PGSQL.5432") as proxy:
        url = f"postgresql://postgres@127.0.0.1:{proxy.port}/{settings.key_prefix}?sslmode=disable"
        limits = {"postgres_url": url, "postgres_timeout_seconds": 0.5}
        database = Database(settings.model_copy(update=limits), "test")
        await database.open()
        with pytest.raises(PostgresUnavailable):
            await _ask_and_stall(database, kind, proxy)
        proxy.resume()
        async with database.transaction() as connection:
            assert await connection.fetchval("select 3") == 3
        await database.close()
