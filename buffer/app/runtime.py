"""Everything of one process, put together: clients, tasks, and the order in which they start and stop."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

import anyio

from buffer.append.appender import Appender
from buffer.append.coalescer import Coalescer
from buffer.errors import BufferError
from buffer.flush.flusher import Flusher, make_flusher_id
from buffer.metrics import Metrics
from buffer.model.position import pack
from buffer.path import Path
from buffer.read.reader import Reader
from buffer.settings import Settings
from buffer.store.items import ItemReader
from buffer.store.migrate import Migration, check_schema, migrate
from buffer.store.pool import Database
from buffer.store.shards import ShardStore, application_name
from buffer.stream.client import RedisClient
from buffer.stream.link import Calls
from buffer.stream.marks import Marks
from buffer.stream.shards import Shards

_GRANT_WAIT_SECONDS = 10.0


async def migrate_database(
    settings: Settings, on_applied: Callable[[Migration], None] = lambda _: None
) -> int:
    """Bring the database of these settings up to this release; its schema version."""
    async with _database(settings) as database:
        return await migrate(database, settings.shards, on_applied)


@asynccontextmanager
async def open_database(settings: Settings) -> AsyncIterator[Database]:
    """Postgres alone, for what does not need Redis.

    Raises:
        SchemaMismatch, SettingsError, PostgresUnavailable: why it cannot be used.
    """
    async with _database(settings) as database:
        await check_schema(database, settings.shards)
        yield database


@asynccontextmanager
async def _database(settings: Settings, name: str = "buffer:command") -> AsyncIterator[Database]:
    database = Database(settings, name)
    await database.open()
    try:
        yield database
    finally:
        await database.close()


class Runtime:
    """The parts of one process. `open` gives one that is running."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.metrics = Metrics()
        self.client = RedisClient(settings)
        self.flusher_id = make_flusher_id()
        self.database = Database(settings, "buffer")
        self.store = ShardStore(self.database)
        self.path = Path(self.store)
        self.calls = Calls(self.client.link())
        self.shards = Shards(self.calls, settings.key_prefix, settings.shards)
        self.marks = Marks(self.client, self.shards)
        self.items = ItemReader(self.database)
        self.coalescer = Coalescer(
            self.client.link(),
            self.shards.keys,
            self.path,
            self.marks,
            self.metrics,
            most_operations=settings.append_queue_max,
            most_bytes=settings.append_queue_max_bytes,
        )
        self.appender = Appender(settings, self.coalescer, self.shards, self.marks, self.items, self.metrics)
        self.reader = Reader(self.shards, self.path, self.items, self.metrics)
        self.metrics["append_queue_depth"].set_function(lambda: self.coalescer.operations)

    @classmethod
    @asynccontextmanager
    async def open(cls, settings: Settings, *, flusher: bool) -> AsyncIterator[Runtime]:
        """Connect, start the tasks, and with ``flusher`` one flusher; stop all in reverse order.

        Raises:
            SchemaMismatch, SettingsError, PostgresUnavailable, RedisUnavailable: why it cannot start.
        """
        runtime = cls(settings)
        await runtime.database.open()
        try:
            runtime.metrics["schema_version"].set(await check_schema(runtime.database, settings.shards))
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(runtime.calls.run)
                tasks.start_soon(runtime.marks.run)
                tasks.start_soon(runtime.coalescer.run)
                async with runtime.flushing() if flusher else contextlib.nullcontext():
                    await runtime.path.refresh()
                    await runtime._granted(wait=flusher)
                    yield runtime
                tasks.cancel_scope.cancel()
        finally:
            with anyio.CancelScope(shield=True):
                await runtime.client.close()
                await runtime.database.close()

    @asynccontextmanager
    async def flushing(self) -> AsyncIterator[Flusher]:
        """A flusher at work; at the end a last flush, and its shards are handed over.

        It has connections of its own: a successor that finds its leases expired ends them, and must not
        hit this process's reads.
        """
        async with _database(self.settings, application_name(self.flusher_id)) as database:
            flusher = Flusher(
                self.settings, self.client, self.shards, database, self.metrics, self.flusher_id
            )
            async with anyio.create_task_group() as tasks:
                await tasks.start(lambda *, task_status: flusher.run(task_status=task_status))
                try:
                    yield flusher
                finally:
                    flusher.stop()

    async def flush(self) -> None:
        """Return once everything that was acked before is in Postgres."""
        every = list(range(self.settings.shards))
        backlogs = await self.shards.peek(every)
        await asyncio.gather(
            *(
                self.marks.wait(shard, pack(backlog.epoch, backlog.mark + backlog.turns))
                for shard, backlog in zip(every, backlogs, strict=True)
                if backlog.epoch is not None and backlog.turns
            )
        )

    async def _granted(self, *, wait: bool) -> None:
        """With a flusher of our own, wait until it has opened every shard that it could claim."""
        if not wait:
            return
        with anyio.move_on_after(_GRANT_WAIT_SECONDS):
            while not all(self.path.epochs):
                await asyncio.sleep(0.02)
                with contextlib.suppress(BufferError):
                    await self.path.refresh()
