"""Real servers for every test, and a database and key prefix of its own for each."""

from __future__ import annotations

import itertools
import os
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import asyncpg
import pytest
from redis.asyncio import Redis

from buffer import Buffer, Settings
from buffer.app.runtime import migrate_database
from buffer.embedded import EmbeddedServers, find_redis_binary
from tests.support.held import Held
from tests.support.processes import Commands

_numbers = itertools.count(1)

# `make test-redis`: everything once more with the redis-server or valkey-server that is on PATH.
REDIS_BINARY = find_redis_binary(prefer_path=True) if os.environ.get("BUFFER_TEST_REDIS_FROM_PATH") else None

# Quick enough for tests, slow enough for a busy machine.
_PACE = {
    "flush_interval_seconds": 0.1,
    "lease_seconds": 1.0,
    "append_timeout_seconds": 10.0,
    "redis_lost_seconds": 5.0,
}


def settings_for(servers: EmbeddedServers, database: str = "buffer", **more: object) -> Settings:
    """Settings that lead to these servers; nothing of the developer's environment gets in."""
    urls = {
        "redis_url": servers.redis.url,
        "postgres_url": servers.postgres.url.replace("/buffer?", f"/{database}?"),
    }
    fields = {
        **{name: field.default for name, field in Settings.model_fields.items()},
        **_PACE,
        **urls,
        **more,
    }
    return Settings(_env_file=None, **fields)


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Attacks first, and where there are several processes all in one: two at a time starve each other."""
    attacks = [item for item in items if item.get_closest_marker("attack")]
    for item in attacks:
        item.add_marker(pytest.mark.xdist_group("attack"))
    items[:] = [*attacks, *(item for item in items if not item.get_closest_marker("attack"))]


@pytest.fixture(autouse=True, scope="session")
def _no_settings_from_outside() -> None:
    for name in [name for name in os.environ if name.startswith("BUFFER_")]:
        del os.environ[name]


@pytest.fixture(scope="session")
def servers() -> Iterator[EmbeddedServers]:
    """Redis and Postgres for the whole run; database ``buffer`` is migrated and serves as template."""
    # Nothing kills these servers, and each test's database is made of 300 files.
    servers = EmbeddedServers.start(redis_binary=REDIS_BINARY, postgres_config={"fsync": "off"})
    with Held(servers) as held:
        held.run(migrate_database(settings_for(held.value)))
        yield held.value


@pytest.fixture
async def settings(servers: EmbeddedServers) -> AsyncIterator[Settings]:
    """Settings with a fresh database and a fresh key prefix."""
    name = f"test_{next(_numbers)}"
    admin = await asyncpg.connect(servers.postgres.url.replace("/buffer?", "/postgres?"))
    try:
        await admin.execute(f"create database {name} template buffer strategy wal_log")
        yield settings_for(servers, name, key_prefix=name)
        await admin.execute(f"drop database {name} with (force)")
    finally:
        await admin.close()


@pytest.fixture(name="buffer")
async def _buffer(settings: Settings) -> AsyncIterator[Buffer]:
    """A buffer with a flusher in this process."""
    async with Buffer.connect(settings, flusher=True) as buffer:
        yield buffer


@pytest.fixture
async def postgres(settings: Settings) -> AsyncIterator[asyncpg.Connection]:
    """A connection to the test's own database."""
    connection = await asyncpg.connect(settings.postgres_url)
    yield connection
    await connection.close()


@pytest.fixture
async def redis(settings: Settings) -> AsyncIterator[Redis]:
    """A client of the Redis that all tests share; the test's keys begin with its key prefix."""
    async with Redis.from_url(settings.redis_url, protocol=2) as client:
        yield client


@pytest.fixture
async def own_servers() -> AsyncIterator[EmbeddedServers]:
    """Servers for one test alone, to be killed and stopped; migrated."""
    async with EmbeddedServers.start(redis_binary=REDIS_BINARY) as servers:
        await migrate_database(settings_for(servers))
        yield servers


@pytest.fixture
def own_settings(own_servers: EmbeddedServers) -> Settings:
    """Settings that lead to `own_servers`."""
    return settings_for(own_servers)


@pytest.fixture
def commands(tmp_path: Path) -> Iterator[Commands]:
    """Starts child processes, and ends them with the test."""
    children = Commands(tmp_path)
    yield children
    children.close()
