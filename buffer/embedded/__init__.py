"""Real servers as part of this process: Redis (or Valkey) and Postgres, started and ended here.

Promises:

* start() returns once both serve, with their data in force; both start at the same time;
* when the owner ends, both end: by a normal exit, an error, a cancellation, or (by the keeper) a crash;
* a temporary directory is removed then; a given one is kept, and the next start continues with its data;
* one owner a directory.
"""

from __future__ import annotations

import asyncio
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING

from buffer.embedded.binaries import find_redis_binary
from buffer.embedded.postgres_server import PostgresServer
from buffer.embedded.redis_server import RedisServer
from buffer.embedded.workspace import Workspace, finish

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Mapping
    from pathlib import Path

__all__ = ["EmbeddedServers", "PostgresServer", "RedisServer", "find_redis_binary"]


class EmbeddedServers:
    """Both servers on one directory: `redis` and `postgres` below it."""

    def __init__(self, redis: RedisServer, postgres: PostgresServer, workspace: Workspace) -> None:
        self.redis = redis
        self.postgres = postgres
        self.directory = workspace.directory
        self._workspace = workspace

    @classmethod
    @asynccontextmanager
    async def start(
        cls,
        directory: Path | None = None,
        *,
        redis_binary: Path | None = None,
        redis_config: Mapping[str, str] | None = None,
        postgres_config: Mapping[str, str] | None = None,
        tcp: bool = False,
    ) -> AsyncIterator[EmbeddedServers]:
        """Start both; stop them at the end. ``directory`` None: a temporary one.

        Raises EmbeddedError if the extra is not installed, if another process has the directory, or
        with the end of a server's log if it does not come up.
        """
        workspace = Workspace(directory, ["redis", "postgres"])
        place = workspace.directory
        redis = RedisServer(
            place, binary=redis_binary, config=redis_config, tcp=tcp, folder="redis", workspace=workspace
        )
        postgres = PostgresServer(
            place, config=postgres_config, tcp=tcp, folder="postgres", workspace=workspace
        )
        servers = cls(redis, postgres, workspace)
        try:
            await workspace.open()
            await servers._start_both()
            yield servers
        finally:
            await finish(servers._stop_both())

    async def _start_both(self) -> None:
        try:
            async with asyncio.TaskGroup() as group:
                group.create_task(self.redis.start())
                group.create_task(self.postgres.start())
        except BaseExceptionGroup as errors:
            # The other server was cancelled, so there is one error, seldom two.
            raise errors.exceptions[0] from None

    async def _stop_both(self) -> None:
        outcomes = await asyncio.gather(self.redis.stop(), self.postgres.stop(), return_exceptions=True)
        await asyncio.to_thread(self._workspace.close)
        for outcome in outcomes:
            if isinstance(outcome, BaseException):
                raise outcome
