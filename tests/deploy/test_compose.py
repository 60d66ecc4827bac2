"""The compose file names only what exists: commands, variables, files, ports."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from buffer.cli import _COMMANDS
from buffer.settings import Settings

ROOT = Path(__file__).parents[2]
COMPOSE = ROOT / "docker-compose.yml"


@pytest.fixture(scope="module")
def compose() -> dict[str, Any]:
    return yaml.safe_load(COMPOSE.read_text())


def ours(compose: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """The services that run this package."""
    return {name: service for name, service in compose["services"].items() if "build" in service}


def test_compose_file_follows_the_published_schema() -> None:
    """check-jsonschema's copy of the compose specification accepts the file."""
    result = subprocess.run(
        [sys.executable, "-m", "check_jsonschema", "--builtin-schema", "vendor.compose-spec", str(COMPOSE)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stdout + result.stderr


def test_every_service_of_ours_runs_a_command_that_exists(compose: dict[str, Any]) -> None:
    """A renamed command breaks this test, not a deployment."""
    services = ours(compose)
    assert {"migrate", "flusher"} <= set(services)
    for service in services.values():
        assert service["command"][0] in _COMMANDS


def test_every_variable_of_ours_is_a_setting_with_a_value_that_it_accepts(
    compose: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The environment of each service loads as settings, and no variable is ignored."""
    for service in ours(compose).values():
        for name, value in service["environment"].items():
            assert name.removeprefix("BUFFER_").lower() in Settings.model_fields, name
            monkeypatch.setenv(name, re.sub(r"\$\{\w+\}", "secret", str(value)))
        settings = Settings.load()
        assert settings.redis_url == "redis://:secret@redis:6379/0"


def test_published_ports_are_the_ports_that_are_served(compose: dict[str, Any]) -> None:
    """The flusher's published port is its metrics port, on loopback only."""
    flusher = compose["services"]["flusher"]
    host, published, served = flusher["ports"][0].split(":")
    assert host == "127.0.0.1"
    assert published == served == flusher["environment"]["BUFFER_METRICS_PORT"]


def test_dependencies_and_mounted_files_exist(compose: dict[str, Any]) -> None:
    """Each depends_on names a service; each bind mount and Dockerfile is in the repository."""
    services = compose["services"]
    for service in services.values():
        assert set(service.get("depends_on", {})) <= set(services)
        for volume in service.get("volumes", []):
            source = volume.split(":")[0]
            assert (ROOT / source).exists() if source.startswith(".") else source in compose["volumes"]
        if "build" in service:
            assert (ROOT / service["build"]["dockerfile"]).is_file()


def test_the_password_line_that_compose_edits_is_in_redis_conf() -> None:
    """The sed of the redis service changes exactly the default user's line."""
    lines = [line for line in (ROOT / "redis.conf").read_text().splitlines() if " nopass " in line]
    assert [line for line in lines if not line.startswith("#")] == [
        line for line in lines if line.startswith("user default ")
    ]
    assert sum(line.startswith("user default ") for line in lines) == 1


def test_everything_that_the_dockerfile_copies_exists() -> None:
    """A COPY of a file that was renamed fails here."""
    for line in (ROOT / "deploy" / "Dockerfile").read_text().splitlines():
        if line.startswith("COPY ") and "--from" not in line:
            *sources, _ = line.split()[1:]
            assert all((ROOT / source).exists() for source in sources)


def test_the_flusher_gets_time_for_its_last_flush(compose: dict[str, Any]) -> None:
    """SIGKILL must not come before the last flush and the hand-over have had their bounds."""
    from buffer.flush import flusher

    grace = int(compose["services"]["flusher"]["stop_grace_period"].removesuffix("s"))
    assert grace > flusher._LAST_FLUSH_SECONDS + 5
