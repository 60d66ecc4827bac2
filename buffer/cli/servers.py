"""``buffer dev``, ``buffer flusher``, ``buffer migrate``."""

from __future__ import annotations

import contextlib
import logging
from pathlib import Path
from typing import Annotated

import anyio
from cyclopts import Parameter

from buffer.app.buffer import Buffer
from buffer.app.runtime import Runtime, migrate_database
from buffer.cli.common import Common, note, print_json, run, wait_for_stop
from buffer.errors import SchemaMismatch, Unavailable
from buffer.settings import Settings

_log = logging.getLogger(__name__)

_NOT_READY_RETRY_SECONDS = 2.0


def dev(
    *,
    data_dir: Annotated[
        Path | None, Parameter(help="Keep the data here; without it everything is temporary.")
    ] = None,
    metrics_port: Annotated[int, Parameter(help="Prometheus port; 0 takes a free one.")] = 0,
    redis_from_path: Annotated[
        bool, Parameter(negative="", help="Use redis-server or valkey-server from PATH.")
    ] = False,
    common: Common | None = None,
) -> None:
    """Start everything embedded: Redis, Postgres and a flusher, until Ctrl-C or SIGTERM."""
    settings = (common or Common()).settings()

    async def main() -> None:
        buffer = Buffer.embedded(data_dir, settings=settings, redis_from_path=redis_from_path)
        async with anyio.create_task_group() as tasks:
            stop = anyio.Event()

            async def watch() -> None:
                await wait_for_stop()
                stop.set()

            tasks.start_soon(watch)
            async with buffer as opened:
                port, handle = opened.runtime.metrics.serve(settings.host, metrics_port)
                try:
                    _print_urls(opened.settings, f"http://{settings.host}:{port}/metrics", data_dir)
                    await stop.wait()
                    note("stopping: a last flush, then the servers")
                finally:
                    opened.runtime.metrics.stop_serving(handle)
            tasks.cancel_scope.cancel()

    run(main)


def _print_urls(settings: Settings, metrics: str, data_dir: Path | None) -> None:
    kept = f"kept in {data_dir}" if data_dir is not None else "temporary, gone at the end"
    print(f"export BUFFER_REDIS_URL='{settings.redis_url}'")
    print(f"export BUFFER_POSTGRES_URL='{settings.postgres_url}'", flush=True)
    note(f"data: {kept}")
    note(f"try:  curl -s {metrics} | grep unflushed")
    note("      (in another shell, with the two exports) buffer status --watch")
    note("Ctrl-C stops everything")


def flusher(*, common: Common | None = None) -> None:
    """Flush shards into Postgres, sharing them with other flushers, until SIGTERM.

    Metrics are served on BUFFER_HOST:BUFFER_METRICS_PORT. SIGTERM flushes once more and hands over.
    """
    settings = (common or Common()).settings()

    async def main() -> None:
        async with anyio.create_task_group() as tasks:
            stop = anyio.Event()

            async def watch() -> None:
                _log.info("%s: a last flush, then the shards are handed over", await wait_for_stop())
                stop.set()

            tasks.start_soon(watch)
            with contextlib.suppress(_Stopped):
                await _flush_until(stop, settings)
            tasks.cancel_scope.cancel()

    run(main)


class _Stopped(Exception):
    """Told to stop before the servers were there."""


async def _flush_until(stop: anyio.Event, settings: Settings) -> None:
    while True:
        try:
            async with Runtime.open(settings, flusher=False, accepting=False) as runtime:
                await _flush(runtime, stop)
                return
        except* (SchemaMismatch, Unavailable) as errors:
            _log.error("not ready: %s", "; ".join(map(str, errors.exceptions)))
        with anyio.move_on_after(_NOT_READY_RETRY_SECONDS):
            await stop.wait()
            raise _Stopped


async def _flush(runtime: Runtime, stop: anyio.Event) -> None:
    settings = runtime.settings
    served = runtime.metrics.serve(settings.host, settings.metrics_port) if settings.metrics_port else None
    try:
        async with runtime.flushing() as worker:
            _log.info(
                "flusher %s holds shards %s%s",
                worker.id,
                worker.held,
                f", metrics on http://{settings.host}:{served[0]}/metrics" if served else "",
            )
            await stop.wait()
    finally:
        if served is not None:
            runtime.metrics.stop_serving(served[1])
    _log.info("flusher %s has handed its shards over", worker.id)


def migrate(*, json: Annotated[bool, Parameter(negative="")] = False, common: Common | None = None) -> None:
    """Bring the database's schema up to this release. Safe to run from many processes at once."""
    settings = (common or Common()).settings()
    applied: list[str] = []

    async def main() -> int:
        def on_applied(migration: object) -> None:
            name = f"{migration.version:04d}_{migration.name}"  # type: ignore[attr-defined]
            applied.append(name)
            note(f"applied {name}")

        return await migrate_database(settings, on_applied)

    version = run(main)
    if json:
        print_json({"schema_version": version, "applied": applied, "shards": settings.shards})
    else:
        print(f"schema version {version}, {settings.shards} shards")
