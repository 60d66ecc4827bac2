"""`Buffer`: one process's way into the service."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from pathlib import Path
from types import TracebackType
from typing import Self

from buffer.app.conversation import Conversation
from buffer.app.limits import check_count
from buffer.app.runtime import Runtime, migrate_database
from buffer.errors import BufferError, Unavailable
from buffer.model.ids import check_id, make_conversation_id
from buffer.model.types import ConversationPage, Erased
from buffer.settings import Settings
from buffer.store.removals import erasable_conversations
from buffer.summaries.summarizer import Summarizer

Opener = Callable[[], AbstractAsyncContextManager[Runtime]]


class Buffer:
    """Appends to and reads from conversations. Made by `connect` or `embedded`, used with ``async with``.

    It may be entered in one task and left in another, as fixtures and lifespans do: a task of its own
    holds everything that must be opened and closed in the same place.
    """

    def __init__(self, opener: Opener) -> None:
        self._opener = opener
        self._runtime: Runtime | None = None
        self._holder: asyncio.Task[None] | None = None
        self._close = asyncio.Event()

    @classmethod
    def connect(
        cls,
        settings: Settings | None = None,
        *,
        redis: str | None = None,
        postgres: str | None = None,
        flusher: bool = False,
        summarizer: Summarizer | None = None,
    ) -> Self:
        """A buffer over running servers; ``redis`` and ``postgres`` are URLs that win over the settings.

        With ``flusher`` this process also flushes, and makes summaries if there is a summarizer: yours, or
        the one of the settings.
        """
        settings = settings or Settings.load()
        urls = {"redis_url": redis, "postgres_url": postgres}
        given = {name: url for name, url in urls.items() if url is not None}
        if given:
            settings = Settings.load(**{**settings.model_dump(), **given})
        return cls(lambda: Runtime.open(settings, flusher=flusher, summarizer=summarizer))

    @classmethod
    def embedded(
        cls,
        data_dir: Path | str | None = None,
        *,
        settings: Settings | None = None,
        redis_from_path: bool = False,
        flusher: bool = True,
        summarizer: Summarizer | None = None,
    ) -> Self:
        """A buffer with real Redis and Postgres servers of its own, started here, with a flusher.

        ``data_dir`` keeps the data; without it everything is temporary. ``redis_from_path`` takes
        ``redis-server`` or ``valkey-server`` from PATH. Needs the extra ``embedded``.
        """

        @asynccontextmanager
        async def opener() -> AsyncIterator[Runtime]:
            # Imported late: most processes run against servers that are there already.
            from buffer.embedded import EmbeddedServers, find_redis_binary  # noqa: PLC0415

            binary = find_redis_binary(prefer_path=True) if redis_from_path else None
            directory = Path(data_dir) if data_dir is not None else None
            async with EmbeddedServers.start(directory, redis_binary=binary) as servers:
                urls = {"redis_url": servers.redis.url, "postgres_url": servers.postgres.url}
                ours = (settings or Settings.load()).model_copy(update=urls)
                await migrate_database(ours)
                async with Runtime.open(ours, flusher=flusher, summarizer=summarizer) as runtime:
                    yield runtime

        return cls(opener)

    async def __aenter__(self) -> Self:
        ready: asyncio.Future[Runtime] = asyncio.get_running_loop().create_future()
        self._close.clear()
        self._holder = asyncio.create_task(self._hold(ready), name="buffer")
        try:
            self._runtime = await asyncio.shield(ready)
        except asyncio.CancelledError:
            self._close.set()
            self._holder.cancel()
            await asyncio.gather(self._holder, return_exceptions=True)
            raise
        return self

    async def _hold(self, ready: asyncio.Future[Runtime]) -> None:
        try:
            async with self._opener() as runtime:
                if not ready.done():
                    ready.set_result(runtime)
                await self._close.wait()
        except BaseException as error:
            error = _only(error)
            if ready.done():
                raise error from None
            ready.set_exception(error)

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._runtime = None
        self._close.set()
        if self._holder is not None:
            await self._holder

    @property
    def runtime(self) -> Runtime:
        """The parts underneath; for this package's own commands and tests."""
        if self._runtime is None:
            raise BufferError("this Buffer is not open; use `async with`")
        return self._runtime

    @property
    def settings(self) -> Settings:
        """The settings in force."""
        return self.runtime.settings

    def conversation(
        self, conversation: str | None = None, *, tenant: str = "default", user: str | None = None
    ) -> Conversation:
        """A conversation of the tenant; None makes a new id. Nothing is sent or stored by this.

        Raises:
            InvalidRequest: an id breaks the rules of ids.
        """
        return Conversation(
            self.runtime,
            check_id(tenant, "tenant"),
            make_conversation_id() if conversation is None else check_id(conversation, "conversation"),
            user if user is None else check_id(user, "user"),
        )

    async def conversations(
        self, user: str, *, tenant: str = "default", limit: int = 20, after: str | None = None
    ) -> ConversationPage:
        """One page of a user's conversations, newest activity first; it may lag one flush.

        ``after`` is a conversation's id, such as the page's ``last_id`` before. A conversation that moves to
        the front meanwhile may be seen again, or, as the cursor, begin the list anew.

        Raises:
            InvalidRequest: an id breaks the rules of ids, or ``limit`` is not 1 to 1,000.
            NotFound: the user has no conversation ``after``.
            Unavailable: Postgres did not answer.
        """
        check_count(limit, "limit")
        cursor = None if after is None else check_id(after, "after")
        of = (check_id(tenant, "tenant"), check_id(user, "user"))
        return await self.runtime.directory.of_user(*of, limit, cursor)

    async def delete_user(self, user: str, *, tenant: str = "default") -> list[Erased]:
        """Erase every conversation of a user; what was erased. New ones that begin meanwhile stay.

        Raises:
            Unavailable, OutcomeUnknown: a part may be erased; try again, which goes on with the rest.
        """
        check_id(user, "user")
        await self.flush()  # a conversation is known to be the user's once its first item is flushed
        if not await self.runtime.paths.is_clean():
            raise Unavailable("a process that may hold conversations of the user is missing", retry_after=1.0)
        erased: list[Erased] = []
        async for page in erasable_conversations(self.runtime.database, check_id(tenant, "tenant"), user):
            conversations = [self.conversation(conversation, tenant=tenant) for conversation in page]
            erased += await asyncio.gather(*(conversation.delete() for conversation in conversations))
        return erased

    async def flush(self) -> None:
        """Return once everything that was acked before is in Postgres."""
        await self.runtime.flush()


def _only(error: BaseException) -> BaseException:
    """The error inside nested groups of one: task groups wrap what callers want to catch by type."""
    while isinstance(error, BaseExceptionGroup) and len(error.exceptions) == 1:
        error = error.exceptions[0]
    return error
