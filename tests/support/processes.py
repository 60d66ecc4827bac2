"""Child processes that run this package's commands, and never outlive their test."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

from buffer import Settings

REPOSITORY = Path(__file__).parents[2]


def environment(settings: Settings, **more: str) -> dict[str, str]:
    """The environment in which a child process has exactly these settings."""
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("BUFFER_")}
    given = {
        f"BUFFER_{name.upper()}": json.dumps(value) if isinstance(value, dict) else str(value)
        for name, value in settings.model_dump().items()
    }
    return {**inherited, **given, "PYTHONPATH": str(REPOSITORY), **more}


class Command:
    """One running ``python`` child; its stdout and stderr go to ``log``."""

    def __init__(self, arguments: list[str], log: Path, env: dict[str, str], cwd: Path) -> None:
        self.log = log
        with log.open("wb") as output:
            self._process = subprocess.Popen(
                [sys.executable, *arguments],
                env=env,
                cwd=cwd,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
            )

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def exit_code(self) -> int | None:
        """None while it runs; the negative signal number if one ended it."""
        return self._process.poll()

    @property
    def text(self) -> str:
        """What it wrote so far."""
        return self.log.read_text(errors="replace")

    def send(self, number: signal.Signals) -> None:
        with contextlib.suppress(ProcessLookupError):
            self._process.send_signal(number)

    def kill(self) -> None:
        """SIGKILL, which ends a stopped process too, and wait for its end."""
        self.send(signal.SIGKILL)
        self._process.wait(10)


class Commands:
    """Starts children; `close` ends those that are left."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._children: list[Command] = []

    def start(self, settings: Settings, *arguments: str, **env: str) -> Command:
        """``python ARGUMENTS`` with these settings and environment variables."""
        log = self._directory / f"child-{len(self._children)}.log"
        # In the test's directory, so that no .env file of the developer is read.
        child = Command(list(arguments), log, environment(settings, **env), self._directory)
        self._children.append(child)
        return child

    def flusher(self, settings: Settings, *, crash_at: str = "") -> Command:
        """``buffer flusher``; ``crash_at`` arms a point of `buffer.faults`."""
        settings = settings.model_copy(update={"metrics_port": 0})
        return self.start(settings, "-m", "buffer", "flusher", BUFFER_CRASH_AT=crash_at)

    def close(self) -> None:
        for child in self._children:
            child.kill()
