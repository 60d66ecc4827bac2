"""The commands as a user runs them: arguments, output, exit codes, signals."""

from __future__ import annotations

import asyncio
import json
import signal
import subprocess
import sys
import urllib.request
from pathlib import Path

import pytest

from buffer import Buffer, Settings
from tests.support.polling import eventually
from tests.support.processes import REPOSITORY, Command, Commands, environment


async def run(
    settings: Settings, *arguments: str, cwd: Path, stdin: str = ""
) -> subprocess.CompletedProcess[str]:
    """``buffer ARGUMENTS`` to its end, while this process goes on."""
    return await asyncio.to_thread(
        subprocess.run,
        [sys.executable, "-m", "buffer", *arguments],
        env=environment(settings),
        cwd=cwd,
        input=stdin,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


async def ended(child: Command, seconds: float = 20.0) -> int:
    """The child's exit code."""

    async def code() -> str | None:
        return None if child.exit_code is None else str(child.exit_code)

    return int(await eventually(code, seconds=seconds))


async def test_help_names_every_command_and_usage_errors_exit_2(settings: Settings, tmp_path: Path) -> None:
    """``--help`` lists the commands with a line each; nonsense is exit code 2 with a message on stderr."""
    shown = (await run(settings, "--help", cwd=tmp_path)).stdout
    for command in ("dev", "demo", "flusher", "migrate", "import", "export", "status", "tail", "bench"):
        assert f"│ {command} " in shown
    refused = await run(settings, "status", "--max-lag", "soon", cwd=tmp_path)
    assert refused.returncode == 2
    assert "soon" in refused.stderr
    assert (await run(settings, "no-such-command", cwd=tmp_path)).returncode == 2


async def test_erasures_are_exported_and_replayed(settings: Settings, tmp_path: Path) -> None:
    """Data on stdout, reports on stderr or as JSON; a bad line is exit 1, no file 2, no database 3."""
    async with Buffer.connect(settings) as buffer:
        await buffer.conversation("c7", tenant="acme", user="u1").append({"secret": 1})
        (erased,) = await buffer.delete_user("u1", tenant="acme")
    shown = await run(settings, "erasures", "export", cwd=tmp_path)
    conversation, user = map(json.loads, shown.stdout.splitlines())
    assert (conversation["conversation"], conversation["through"]) == ("c7", str(erased.through))
    assert (shown.returncode, user["user"], "secret" in shown.stdout) == (0, "u1", False)
    assert "1 erased conversations, 1 erased users" in shown.stderr
    (tmp_path / "erasures.jsonl").write_text(shown.stdout + "nonsense\n")
    replay = await run(settings, "erasures", "replay", "erasures.jsonl", "--json", cwd=tmp_path)
    assert replay.returncode == 1
    assert json.loads(replay.stdout) == {"conversations": 1, "users": 1, "new": 0, "items": 0, "rejected": 1}
    assert "line 3" in replay.stderr
    again = await run(settings, "erasures", "replay", "-", cwd=tmp_path, stdin=shown.stdout)
    assert (again.returncode, again.stdout) == (
        0,
        "1 conversations, 1 users, 0 new, 0 items, 0 rejected\n",
    )
    assert (await run(settings, "erasures", "replay", "nowhere", cwd=tmp_path)).returncode == 2
    away = settings.model_copy(update={"postgres_url": "postgresql://u@127.0.0.1:1/buffer"})
    assert (await run(away, "erasures", "export", cwd=tmp_path)).returncode == 3


async def test_a_dependency_that_is_down_is_exit_3_and_named(settings: Settings, tmp_path: Path) -> None:
    """Neither a traceback nor a password reaches the user."""
    away = settings.model_copy(update={"postgres_url": "postgresql://u:hunter2@127.0.0.1:1/buffer"})
    refused = await run(away, "status", cwd=tmp_path)
    assert refused.returncode == 3
    assert "Postgres" in refused.stderr
    assert "Traceback" not in refused.stderr
    assert "hunter2" not in refused.stderr


async def test_status_shows_every_shard_and_exits_4_over_the_lag(settings: Settings, tmp_path: Path) -> None:
    """Owner, epoch and backlog for people and as JSON; without a flusher an item grows old."""
    slow = settings.model_copy(update={"flush_interval_seconds": 60.0})
    async with Buffer.connect(slow, flusher=True) as buffer:
        await buffer.conversation("c").append({"role": "user", "content": "hi"})
        document = json.loads((await run(settings, "status", "--json", cwd=tmp_path)).stdout)
        assert document["unflushed"] == 1
        assert len(document["shards"]) == settings.shards
        assert {shard["owner"] for shard in document["shards"]} == {buffer.runtime.flusher_id}
        assert document["unowned_shards"] == []
        table = (await run(settings, "status", cwd=tmp_path)).stdout
        assert buffer.runtime.flusher_id in table

        async def too_old() -> bool:
            return (await run(settings, "status", "--max-lag", "0.2", cwd=tmp_path)).returncode == 4

        await eventually(too_old)
    assert (await run(settings, "status", "--max-lag", "1000", cwd=tmp_path)).returncode == 0


async def test_import_and_export_give_back_the_same_lines(settings: Settings, tmp_path: Path) -> None:
    """What import read, export writes; a second import stores nothing; problems exit 1."""
    line = {"conversation_id": "c1", "metadata": {"a": "b"}, "items": [{"role": "user", "content": "hi"}] * 3}
    file = tmp_path / "in.jsonl"
    file.write_text(json.dumps(line) + "\n")
    async with Buffer.connect(settings, flusher=True):
        first = await run(settings, "import", str(file), "--json", cwd=tmp_path)
        assert json.loads(first.stdout)["stored"] == 3, first.stderr
        again = await run(settings, "import", str(file), "--json", cwd=tmp_path)
        assert (json.loads(again.stdout)["stored"], again.returncode) == (0, 0)
        exported = (await run(settings, "export", cwd=tmp_path)).stdout
        written = [json.loads(text) for text in exported.splitlines()]
        assert [{k: w[k] for k in line} for w in written] == [line]
        broken = await run(
            settings, "import", "-", cwd=tmp_path, stdin='{"conversation_id": "c2", "items": 7}\n'
        )
        assert broken.returncode == 1
        assert "items" in broken.stderr


async def test_export_waits_for_what_was_appended_just_before(settings: Settings, tmp_path: Path) -> None:
    """An acked item is in the export although nobody has flushed it when the command begins."""
    slow = settings.model_copy(update={"flush_interval_seconds": 60.0})
    async with Buffer.connect(slow, flusher=True) as buffer:
        await buffer.conversation("c").append({"role": "user", "content": "fresh"})
        assert "fresh" in (await run(settings, "export", cwd=tmp_path)).stdout


async def test_tail_shows_unflushed_items_and_follows(
    settings: Settings, tmp_path: Path, commands: Commands
) -> None:
    """``tail`` prints the newest items; ``--follow`` goes on with those appended later."""
    slow = settings.model_copy(update={"flush_interval_seconds": 60.0})
    async with Buffer.connect(slow, flusher=True) as buffer:
        conversation = buffer.conversation("c")
        await conversation.append({"role": "user", "content": "before"}, id="m-1")
        shown = await run(settings, "tail", "c", "--json", cwd=tmp_path)
        assert json.loads(shown.stdout)["id"] == "m-1"
        follower = commands.start(settings, "-m", "buffer", "tail", "c", "-f")
        await eventually(lambda: "before" in follower.text)
        await conversation.append({"role": "user", "content": "after"})
        await eventually(lambda: "after" in follower.text)


async def test_flusher_is_not_ready_without_migrations_and_names_the_command(
    settings: Settings, tmp_path: Path, commands: Commands, postgres: object
) -> None:
    """A flusher on an empty database waits, says `buffer migrate`, and stops at SIGTERM."""
    await postgres.execute("drop schema buffer cascade")  # type: ignore[attr-defined]
    flusher = commands.flusher(settings)
    await eventually(lambda: "buffer migrate" in flusher.text)
    migrated = await run(settings, "migrate", "--json", cwd=tmp_path)
    assert json.loads(migrated.stdout)["shards"] == settings.shards
    await eventually(lambda: "holds shards" in flusher.text)
    flusher.send(signal.SIGTERM)
    assert await ended(flusher) == 0


async def test_flusher_serves_its_metrics(settings: Settings, commands: Commands) -> None:
    """The metrics of the shards are there, over HTTP, on the flusher's own port."""
    with_port = settings.model_copy(update={"metrics_port": _free_port()})
    flusher = commands.start(with_port, "-m", "buffer", "flusher")
    await eventually(lambda: "holds shards" in flusher.text)

    def scrape() -> str:
        url = f"http://127.0.0.1:{with_port.metrics_port}/metrics"
        with urllib.request.urlopen(url, timeout=5) as answer:
            return answer.read().decode()

    await eventually(lambda: 'buffer_unflushed_turns{shard="0"} 0.0' in scrape())
    assert 'buffer_shard_owned{shard="0"} 1.0' in scrape()


def _free_port() -> int:
    import socket

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


async def test_dev_keeps_its_data_over_a_restart_and_cleans_up(tmp_path: Path, commands: Commands) -> None:
    """`buffer dev --data-dir D`: what was appended is there after SIGTERM and a second start."""
    data = tmp_path / "data"
    for content, expected in (("first", ["first"]), ("second", ["first", "second"])):
        dev = commands.start(Settings(_env_file=None), "-m", "buffer", "dev", "--data-dir", str(data))
        await eventually(lambda dev=dev: "Ctrl-C" in dev.text, seconds=60)
        urls = dict(
            line.removeprefix("export ").split("=", 1) for line in dev.text.splitlines() if "=" in line
        )
        redis, postgres = (urls[f"BUFFER_{name}_URL"].strip("'") for name in ("REDIS", "POSTGRES"))
        plain = Settings(_env_file=None)
        async with Buffer.connect(plain, redis=redis, postgres=postgres) as buffer:
            conversation = buffer.conversation("kept")
            await conversation.append({"role": "user", "content": content})
            assert [item["content"] for item in (await conversation.items()).items] == expected
        dev.send(signal.SIGTERM)
        assert await ended(dev) == 0, dev.text
        assert "stopping" in dev.text


@pytest.mark.attack
async def test_demo_passes_and_a_planted_loss_fails_it(settings: Settings, tmp_path: Path) -> None:
    """The demo computes what it prints: one acked row removed behind its back is reported, exit 1."""
    honest = await run(settings, "demo", "--seconds", "2", "--json", cwd=tmp_path)
    report = json.loads(honest.stdout)
    assert honest.returncode == 0, honest.stderr
    assert report["acked"] == report["appended"] == report["in_postgres"] > 1_000
    planted = await run(settings, "demo", "--seconds", "2", "--json", "--plant", "lost", cwd=tmp_path)
    assert planted.returncode == 1
    assert json.loads(planted.stdout)["missing"] == 1


def test_quickstart_of_the_readme_runs_and_prints_what_the_readme_says(tmp_path: Path) -> None:
    """The ten lines in README.md are run, and their output compared."""
    readme = (REPOSITORY / "README.md").read_text()
    code = readme.split("```python\n")[1].split("```")[0]
    printed = readme.split("```python\n")[1].split("```\n")[2]
    result = subprocess.run(
        [sys.executable, "-c", code],
        env=environment(Settings(_env_file=None)),
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout == printed
