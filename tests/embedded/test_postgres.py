"""One Postgres server and its verbs."""

from __future__ import annotations

import asyncio
import os
from pathlib import Path

import asyncpg
import pytest

from buffer.embedded import PostgresServer
from buffer.errors import EmbeddedError

from . import support


async def value(server: PostgresServer, query: str) -> object:
    connection = await asyncpg.connect(server.url, timeout=5)
    try:
        return await connection.fetchval(query)
    finally:
        await connection.close()


@pytest.mark.parametrize("tcp", [False, True])
async def test_kill_with_busy_backends_restarts_at_once(place: Path, tcp: bool) -> None:
    """kill() takes the busy backends too, so that nothing holds the shared memory."""
    async with PostgresServer(place / "p", tcp=tcp) as server:
        url = server.url
        await value(server, "CREATE TABLE t AS SELECT 1 AS n")
        for _ in range(3):
            busy = [await asyncpg.connect(url) for _ in range(3)]
            tasks = [
                asyncio.create_task(c.execute("SELECT count(*) FROM generate_series(1, 1e12::bigint)"))
                for c in busy
            ]
            await asyncio.wait(tasks, timeout=0.2)
            await server.kill()
            assert server.pid is None
            assert not support.servers(server.directory)
            for failed in await asyncio.gather(*tasks, return_exceptions=True):
                assert isinstance(failed, (asyncpg.PostgresError, OSError))
            await asyncio.wait_for(server.restart(), 10)
            assert server.url == url
            assert await value(server, "SELECT n FROM t") == 1


@pytest.mark.parametrize("mode", ["fast", "immediate"])
async def test_stop_and_restart_keep_data(place: Path, mode: str) -> None:
    """Both ways to stop keep what was committed."""
    async with PostgresServer(place / "p") as server:
        await value(server, "CREATE TABLE t AS SELECT 1 AS n")
        await server.stop(mode)  # type: ignore[arg-type]
        assert server.pid is None
        await server.restart()
        assert await value(server, "SELECT n FROM t") == 1


async def test_paused_server_answers_after_resume(place: Path) -> None:
    """pause() holds connected sessions and new ones; resume() lets them go on."""
    async with PostgresServer(place / "p") as server:
        connection = await asyncpg.connect(server.url)
        server.pause()
        asked = asyncio.create_task(connection.fetchval("SELECT 1"))
        joined = asyncio.create_task(asyncpg.connect(server.url))
        done, _ = await asyncio.wait([asked, joined], timeout=0.2)
        assert not done
        server.resume()
        assert await asked == 1
        await (await joined).close()
        await connection.close()


async def test_wipe_makes_a_new_cluster(place: Path) -> None:
    """After wipe() the database is there, and empty."""
    async with PostgresServer(place / "p") as server:
        await value(server, "CREATE TABLE t ()")
        with pytest.raises(EmbeddedError, match="running"):
            server.wipe()
        await server.kill()
        server.wipe()
        await server.restart()
        assert await value(server, "SELECT to_regclass('t')") is None


async def test_stale_pid_file_does_not_stop_a_start(place: Path) -> None:
    """After a reboot, the pid in the file may be anybody's."""
    async with PostgresServer(place / "p") as server:
        await server.stop()
        (server.data / "postmaster.pid").write_text(f"{os.getpid()}\n{server.data}\n1\n5432\n\n\n\n\n")
        await server.restart()
        assert await value(server, "SELECT 1") == 1


async def test_interrupted_creation_is_made_good(place: Path) -> None:
    """Half a data directory, or one without the database, is completed by the next start."""
    unfinished = place / "p" / "data.new"
    unfinished.mkdir(parents=True)
    (unfinished / "PG_VERSION").write_text("18\n")
    async with PostgresServer(place / "p") as server:
        connection = await asyncpg.connect(server.url, database="postgres")
        await connection.execute("DROP DATABASE buffer")
        await connection.close()
        await server.stop()
        await server.restart()
        assert await value(server, "SELECT current_database()") == "buffer"
