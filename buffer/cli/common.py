"""What the commands share: options, exit codes, running under uvloop, signals."""

from __future__ import annotations

import gc
import json
import logging
import signal
import sys
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, TypeVar

import anyio
from cyclopts import Parameter

from buffer.errors import BufferError, InvalidRequest, SettingsError, Unavailable
from buffer.settings import Settings

EXIT_FAILED = 1
EXIT_USAGE = 2
EXIT_UNAVAILABLE = 3
EXIT_THRESHOLD = 4

_T = TypeVar("_T")


@Parameter(name="*")
@dataclass(slots=True, frozen=True)
class Common:
    """Options of every command that talks to servers; the environment says the rest (``BUFFER_...``)."""

    redis_url: Annotated[str | None, Parameter(help="Redis; BUFFER_REDIS_URL otherwise.")] = None
    postgres_url: Annotated[str | None, Parameter(help="Postgres; BUFFER_POSTGRES_URL otherwise.")] = None
    config: Annotated[Path | None, Parameter(help="A TOML file with settings.")] = None
    log_level: Annotated[str, Parameter(help="debug, info, warning or error; logs go to stderr.")] = "info"

    def settings(self, **overrides: Any) -> Settings:
        """The settings with these options on top; also sets logging up."""
        set_up_logging(self.log_level)
        urls = {"redis_url": self.redis_url, "postgres_url": self.postgres_url}
        given = {name: value for name, value in {**urls, **overrides}.items() if value is not None}
        return Settings.load(self.config, **given)


def set_up_logging(level: str) -> None:
    """Log lines to stderr.

    Raises:
        SettingsError: there is no such level.
    """
    levels = logging.getLevelNamesMapping()
    if level.upper() not in levels:
        raise SettingsError(f"--log-level {level!r} is not one of debug, info, warning, error")
    logging.basicConfig(
        stream=sys.stderr,
        level=levels[level.upper()],
        format="%(asctime)s %(levelname)s %(name)s: %(message)s",
    )


def exit_code_of(error: BaseException) -> int | None:
    """The exit code that an error stands for; None for one that deserves a traceback."""
    if isinstance(error, SettingsError | InvalidRequest):
        return EXIT_USAGE
    if isinstance(error, Unavailable):
        return EXIT_UNAVAILABLE
    if isinstance(error, BufferError | OSError):
        return EXIT_FAILED
    return None


def run(command: Callable[[], Awaitable[_T]]) -> _T:
    """Run a command's coroutine under uvloop; a group of one error is raised as that error."""
    # A flush makes tens of thousands of objects at once and hardly a cycle. Looking for cycles after
    # every 700 of them takes a tenth of its time; a library must not decide that, a command may.
    gc.freeze()
    gc.set_threshold(100_000, 50, 100)
    try:
        return anyio.run(command, backend_options={"use_uvloop": True})
    except BaseExceptionGroup as group:
        error: BaseException = group
        while isinstance(error, BaseExceptionGroup) and len(error.exceptions) == 1:
            error = error.exceptions[0]
        raise error from None


async def wait_for_stop() -> str:
    """Return the name of the first SIGTERM or SIGINT."""
    with anyio.open_signal_receiver(signal.SIGTERM, signal.SIGINT) as signals:
        async for number in signals:
            return signal.Signals(number).name
    raise AssertionError("the stream of signals ended")


def note(text: str) -> None:
    """A line for people, on stderr."""
    print(text, file=sys.stderr, flush=True)


def print_json(value: Any) -> None:
    """One JSON document on stdout."""
    print(json.dumps(value, default=str), flush=True)
