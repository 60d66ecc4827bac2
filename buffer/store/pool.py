"""Connections to Postgres, and the translation of its driver's errors."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from typing import TypeAlias

import asyncpg
from asyncpg.pool import PoolConnectionProxy

from buffer.errors import BufferError, PostgresUnavailable, SchemaMismatch, SettingsError
from buffer.policy.failures import classify_sqlstate
from buffer.settings import Settings

Connection: TypeAlias = "asyncpg.Connection[asyncpg.Record] | PoolConnectionProxy[asyncpg.Record]"


class DuplicateRows(BufferError):
    """A row is there already (23505); the transaction did nothing."""


class BadRows(BufferError):
    """A row is at fault (22, 23, or it cannot be encoded); the transaction did nothing."""


class StoreRefused(BufferError):
    """Postgres refuses for a reason that needs somebody to act; the transaction did nothing."""


@contextmanager
def translated() -> Iterator[None]:
    """Turn the driver's errors into ours: unavailable, duplicate, bad rows, or refused."""
    try:
        yield
    except asyncpg.PostgresError as error:
        text = f"Postgres: {error}"
        sqlstate = error.sqlstate or ""
        if sqlstate in {"3F000", "42P01"} and "buffer" in str(error):
            raise SchemaMismatch(f"{text}; run `buffer migrate`") from error
        verdict = classify_sqlstate(sqlstate)
        if verdict == "retry":
            raise PostgresUnavailable(text, retry_after=1.0) from error
        raise {"duplicate": DuplicateRows, "data": BadRows, "hold": StoreRefused}[verdict](text) from error
    except asyncpg.DataError as error:
        raise BadRows(f"Postgres: {error}") from error
    except (asyncpg.InterfaceError, asyncpg.InternalClientError, OSError, TimeoutError, EOFError) as error:
        raise PostgresUnavailable(f"Postgres: {error or type(error).__name__}", retry_after=1.0) from error


@asynccontextmanager
async def bounded(connection: Connection, seconds: float | None = None) -> AsyncIterator[None]:
    """End a COPY after ``seconds``, or with its connection; then the connection is gone too.

    While flow control holds a COPY back, the driver waits for nothing else: its own time limit and the
    loss of the connection pass unnoticed, and it would wait for ever (asyncpg 0.32).

    Raises:
        TimeoutError: either.
    """
    loop = asyncio.get_running_loop()

    def lost(_: object) -> None:
        if not bound.expired():
            bound.reschedule(loop.time())

    try:
        async with asyncio.timeout(seconds) as bound:
            connection.add_termination_listener(lost)
            try:
                yield
            finally:
                connection.remove_termination_listener(lost)
    except TimeoutError:
        connection.terminate()
        raise


class Database:
    """A pool that makes its connections when they are needed, so that Postgres may be down at the start.

    ``application_name`` shows in ``pg_stat_activity``; a flusher's is its id, by which a successor
    finds and ends a transaction that it left open.
    """

    def __init__(
        self,
        settings: Settings,
        application_name: str,
        *,
        most_connections: int | None = None,
        acquire_seconds: float = 5.0,
    ) -> None:
        self._settings = settings
        self._application_name = application_name
        self._most_connections = most_connections or settings.postgres_pool_max
        self._acquire_seconds = acquire_seconds
        self._begin = (
            "set local synchronous_commit = on; "
            f"set local idle_in_transaction_session_timeout = {settings.heartbeat_timeout_seconds * 1000:.0f}"
        )
        self._pool: asyncpg.Pool[asyncpg.Record] | None = None
        self.on_query: Callable[[], None] | None = None
        self.timeout_seconds = settings.postgres_timeout_seconds

    async def open(self) -> None:
        """Make the pool; no connection yet."""
        timeout = self._settings.postgres_timeout_seconds
        try:
            self._pool = await asyncpg.create_pool(
                self._settings.postgres_url,
                min_size=0,
                max_size=self._most_connections,
                timeout=min(timeout, self._acquire_seconds),
                command_timeout=timeout,
                statement_cache_size=0 if self._settings.postgres_pooled else 100,
                server_settings={"application_name": self._application_name},
            )
        except (ValueError, asyncpg.InterfaceError) as error:
            raise SettingsError(f"BUFFER_POSTGRES_URL: {error}") from error

    async def close(self) -> None:
        """Close the connections, waiting briefly for those in use, then hard."""
        pool, self._pool = self._pool, None
        if pool is None:
            return
        try:
            async with asyncio.timeout(5):
                await pool.close()
        except (TimeoutError, OSError, asyncpg.PostgresError, asyncpg.InterfaceError):
            pool.terminate()

    @asynccontextmanager
    async def connection(self) -> AsyncIterator[Connection]:
        """A connection from the pool.

        Raises:
            PostgresUnavailable: none to be had, or it broke while it was used.
        """
        if self._pool is None:
            raise PostgresUnavailable("Postgres: the pool is closed")
        if self.on_query is not None:
            self.on_query()
        ended: BaseException | None = None
        try:
            with translated():
                async with self._pool.acquire(
                    timeout=min(self._acquire_seconds, self._settings.postgres_timeout_seconds)
                ) as connection:
                    try:
                        yield connection
                    except (asyncio.CancelledError, TimeoutError) as error:
                        # Ended in good manners it would wait for a server that may not answer at all.
                        ended = error
                        connection.terminate()
                        raise
        except BufferError:
            if isinstance(ended, asyncio.CancelledError):
                raise ended from None  # whatever the pool says of the connection that was ended
            raise

    @asynccontextmanager
    async def transaction(self) -> AsyncIterator[Connection]:
        """A transaction whose commit is on disk when it returns."""
        async with self.connection() as connection:
            transaction = connection.transaction()
            await transaction.start()
            try:
                # Before an ack or a trim nothing less will do, whatever the role's or the server's default
                # is. Whoever is stopped within a transaction must not keep its locks.
                await connection.execute(self._begin)
                yield connection
            except (asyncio.CancelledError, TimeoutError):
                connection.terminate()
                raise
            except BaseException:
                with contextlib.suppress(asyncpg.PostgresError, asyncpg.InterfaceError, OSError):
                    await transaction.rollback()
                raise
            await transaction.commit()
