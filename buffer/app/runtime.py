"""Everything of one process, put together: clients, tasks, and the order in which they start and stop."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import TypeVar

import anyio

from buffer.app.directory import Directory
from buffer.append.appender import Appender
from buffer.append.capacity import Capacity
from buffer.append.coalescer import Coalescer
from buffer.append.replicated import Replicated
from buffer.errors import BufferError
from buffer.events.events import Events
from buffer.flush.flusher import Flusher, make_flusher_id
from buffer.metrics import Metrics
from buffer.model.ids import conversation_key, shard_of
from buffer.model.position import pack
from buffer.model.types import Summary
from buffer.path.member import Member
from buffer.read.history import History
from buffer.read.lookup import Lookup
from buffer.read.reader import Reader
from buffer.read.views import ViewReader
from buffer.settings import Settings
from buffer.store.conversations import ConversationStore
from buffer.store.items import ItemReader
from buffer.store.lookup import LookupStore
from buffer.store.migrate import Migration, check_schema, migrate
from buffer.store.path_moves import PathMoves
from buffer.store.paths import Mode
from buffer.store.pool import Database
from buffer.store.shards import ShardStore, application_name
from buffer.store.summaries import SummaryStore
from buffer.stream.client import RedisClient
from buffer.stream.feed import Feed
from buffer.stream.grants import Grants
from buffer.stream.link import Calls, LinkLost
from buffer.stream.marks import Marks
from buffer.stream.shards import Shards
from buffer.stream.views import Views
from buffer.summaries.summarizer import Summarizer, open_summarizer
from buffer.summaries.worker import CONNECTIONS, SummaryWorker

_C = TypeVar("_C", bound=Coalescer)

_OPEN_WAIT_SECONDS = 10.0
_PATH_CONNECTIONS = 2
_PATH_ACQUIRE_SECONDS = 1.0


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
async def _database(
    settings: Settings, name: str = "buffer:command", most_connections: int | None = None
) -> AsyncIterator[Database]:
    database = Database(settings, name, most_connections=most_connections)
    await database.open()
    try:
        yield database
    finally:
        await database.close()


class Runtime:
    """The parts of one process. `open` gives one that is running."""

    def __init__(self, settings: Settings, *, accepting: bool, summarizer: Summarizer | None = None) -> None:
        self.settings = settings
        self._summarizer = summarizer
        self.metrics = Metrics()
        self.client = RedisClient(settings)
        self.flusher_id = make_flusher_id()
        self.database = Database(settings, "buffer")
        # The path has connections of its own: a heartbeat must not wait for slow reads.
        self._path_database = Database(
            settings,
            "buffer:path",
            most_connections=_PATH_CONNECTIONS,
            acquire_seconds=_PATH_ACQUIRE_SECONDS,
        )
        self.store = ShardStore(self.database)
        self.paths = PathMoves(self._path_database)
        self.calls = Calls(self.client.link(lambda: self.member.run_id))
        # Settling takes Redis its time; meanwhile the next batch is fetched.
        self.settle_calls = Calls(self.client.link(lambda: self.member.run_id))
        self.shards = Shards(
            self.calls,
            settings.key_prefix,
            settings.shards,
            self.flusher_id,
            settling=self.settle_calls,
        )
        # Reads travel alone: what a flusher fetches would hold them up.
        self.read_calls = Calls(self.client.link(lambda: self.member.run_id))
        self.views = Views(
            self.read_calls, self.shards.keys, self.flusher_id, settings.conversation_ttl_seconds
        )
        self.marks = Marks(self.client, self.shards)
        self.items = ItemReader(self.database)
        self.summaries = SummaryStore(self.database)
        self.member = Member(
            settings, self.paths, self.shards, self.marks, self.metrics, self.flusher_id, accepting=accepting
        )
        self.capacity = Capacity(settings, self.client, self.shards, self.member, self.metrics)
        self.coalescer = self._make_coalescer(Coalescer)
        self.replicated = self._make_coalescer(Replicated)
        self.appender = Appender(
            settings,
            self.coalescer,
            self.replicated,
            self.shards,
            self.marks,
            self.items,
            self.member,
            self.metrics,
        )
        self.reader = Reader(
            self.shards, self.views, self.member, self.items, self.metrics, settings.append_timeout_seconds
        )
        self.view_reader = ViewReader(
            settings,
            self.reader,
            self.views,
            self.member,
            self.items,
            lambda: self.capacity.crowded,
            self.metrics,
        )
        lookups = LookupStore(self.database)
        self.lookup = Lookup(self.reader, lookups)
        self.directory = Directory(self.lookup, ConversationStore(self.database))
        self.events = Events(
            self._feed,
            self.member,
            History(self.reader, lookups),
            self.metrics,
            settings.events_buffer_max,
        )
        self.metrics["append_queue_depth"].set_function(lambda: self.coalescer.operations)
        self.metrics["retained_turns"].set_function(lambda: self.member.retention.turns)
        self.metrics["retained_bytes"].set_function(lambda: self.member.retention.bytes)

    def _feed(self, shard: int) -> Feed:
        link = self.client.link(lambda: self.member.run_id)
        return Feed(link, self.shards.keys[shard], self.member.field)

    def _make_coalescer(self, kind: type[_C]) -> _C:
        return kind(
            self.client.link(lambda: self.member.run_id),
            self.shards.keys,
            self.member,
            self.marks,
            self.database,
            self.capacity,
            self.metrics,
            self.settings,
        )

    @classmethod
    @asynccontextmanager
    async def open(
        cls,
        settings: Settings,
        *,
        flusher: bool,
        accepting: bool = True,
        summarizer: Summarizer | None = None,
    ) -> AsyncIterator[Runtime]:
        """Connect, start the tasks, and with ``flusher`` one flusher; stop all in reverse order.

        One that is not ``accepting`` takes no part in the service: it can look, and it can flush. Of two
        summarizers, the one that is given wins over the one of the settings.

        Raises:
            SchemaMismatch, SettingsError, PostgresUnavailable, RedisUnavailable: why it cannot start.
        """
        runtime = cls(settings, accepting=accepting, summarizer=summarizer)
        await runtime.database.open()
        await runtime._path_database.open()
        try:
            runtime.metrics["schema_version"].set(await check_schema(runtime.database, settings.shards))
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(runtime.calls.run)
                tasks.start_soon(runtime.read_calls.run)
                tasks.start_soon(runtime.settle_calls.run)
                tasks.start_soon(runtime.marks.run)
                tasks.start_soon(runtime.member.run)
                tasks.start_soon(runtime.capacity.run)
                tasks.start_soon(runtime.coalescer.run)
                tasks.start_soon(runtime.replicated.run)
                await tasks.start(lambda *, task_status: runtime.events.run(task_status=task_status))
                async with runtime.flushing() if flusher else contextlib.nullcontext():
                    await runtime._opened("stream" if flusher else "direct")
                    yield runtime
                await runtime.member.leave()
                tasks.cancel_scope.cancel()
        finally:
            with anyio.CancelScope(shield=True):
                await runtime.client.close()
                await runtime._path_database.close()
                await runtime.database.close()

    @asynccontextmanager
    async def flushing(self) -> AsyncIterator[Flusher]:
        """A flusher at work, and a worker for summaries; at the end a last flush and a hand-over.

        It has connections of its own: a successor that finds its leases expired ends them, and must not
        hit this process's reads.
        """
        async with (
            _database(self.settings, application_name(self.flusher_id)) as database,
            self._summarizing() as worker,
        ):
            flusher = Flusher(
                self.settings,
                self.client,
                self.shards,
                self.views,
                database,
                self.paths,
                self._grants,
                self.capacity.views_may_grow,
                self.metrics,
                self.flusher_id,
                worker.committed if worker else None,
            )
            async with anyio.create_task_group() as tasks:
                await tasks.start(lambda *, task_status: flusher.run(task_status=task_status))
                try:
                    yield flusher
                finally:
                    flusher.stop()

    @asynccontextmanager
    async def _summarizing(self) -> AsyncIterator[SummaryWorker | None]:
        """A worker for summaries, if there is a summarizer."""
        async with open_summarizer(self.settings) as chosen:
            summarizer = self._summarizer or chosen
            if summarizer is None:
                yield None
                return
            async with _database(self.settings, "buffer:summaries", CONNECTIONS) as database:
                worker = SummaryWorker(
                    self.settings,
                    database,
                    summarizer,
                    self.metrics,
                    self.flusher_id,
                    self.summary_committed,
                )
                async with anyio.create_task_group() as tasks:
                    tasks.start_soon(worker.run)
                    yield worker
                    tasks.cancel_scope.cancel()

    async def summary_committed(self, tenant: str, conversation: str, summary: Summary) -> None:  # noqa: ARG002
        """Called after a summary was committed, by the worker and by `Conversation.set_summary`.

        The view is dropped, and not changed: a deletion may have taken the summary away again by now. If that
        fails, a flusher does it.
        """
        key = conversation_key(tenant, conversation)
        shard = shard_of(key, self.settings.shards)
        state = self.member.states[shard]
        if state.mode == "stream":
            with contextlib.suppress(BufferError):
                await self.views.drop(shard, state.epoch, [key.encode()])

    def _grants(self, expected: Callable[[], str | None]) -> Grants:
        """The grants over a link of their own, whose limit lets a manager try more than once."""
        link = self.client.link(expected, timeout_seconds=max(0.1, self.settings.redis_lost_seconds / 3))
        return Grants(link, self.shards.keys)

    async def flush(self) -> None:
        """Return once everything that was acked before is in Postgres."""
        deadline = time.monotonic() + self.settings.append_timeout_seconds
        while True:
            states = [
                await self.member.open(shard, self.settings.append_timeout_seconds)
                for shard in range(self.settings.shards)
            ]
            streams = [shard for shard, state in enumerate(states) if state.mode == "stream"]
            if not streams:
                return
            try:
                backlogs = await self.shards.peek(streams)
                break
            except LinkLost:
                if time.monotonic() > deadline:
                    raise
                await asyncio.sleep(0.02)
        await asyncio.gather(
            *(
                self.marks.wait(shard, pack(backlog.epoch, backlog.mark + backlog.turns))
                for shard, backlog in zip(streams, backlogs, strict=True)
                if backlog.epoch is not None and backlog.turns
            )
        )

    async def _opened(self, mode: Mode) -> None:
        """Wait a while until every shard takes appends: with a flusher of our own, through Redis."""
        deadline = time.monotonic() + _OPEN_WAIT_SECONDS
        while time.monotonic() < deadline:
            with contextlib.suppress(BufferError, TimeoutError):
                await self.member.refresh()
                if all(state.mode in {"stream", mode} for state in self.member.states):
                    return
            await asyncio.sleep(0.01)
