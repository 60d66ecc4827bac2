"""How this process reaches Redis, by URL alone.

The driver's own retries are off: it would run a command again that may have run already, and only the
append path knows that this is safe (its ids make it so).
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import aclosing
from typing import Any

from redis.asyncio import ConnectionPool, Redis
from redis.asyncio.connection import AbstractConnection
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from redis.exceptions import RedisError

from buffer.errors import RedisUnavailable, SettingsError
from buffer.settings import Settings
from buffer.stream.link import Link

_SCHEMES = ("redis://", "rediss://", "unix://")


class RedisClient:
    """Makes connections for one Redis, described by one URL."""

    def __init__(self, settings: Settings) -> None:
        if not settings.redis_url.startswith(_SCHEMES):
            raise SettingsError(f"BUFFER_REDIS_URL must start with one of {', '.join(_SCHEMES)}")
        self._timeout_seconds = settings.redis_timeout_seconds
        try:
            self._pool = ConnectionPool.from_url(
                settings.redis_url,
                protocol=2,  # RESP3 push messages switch off the driver's dirty-connection check
                retry=Retry(NoBackoff(), 0),
                socket_timeout=None,  # the link has a limit of its own around a whole round trip
                socket_connect_timeout=settings.redis_timeout_seconds,
                health_check_interval=0,
            )
        except ValueError as error:
            raise SettingsError(f"BUFFER_REDIS_URL: {error}") from error

    def _make_connection(self) -> AbstractConnection:
        connection: AbstractConnection = self._pool.make_connection()  # type: ignore[no-untyped-call]
        return connection

    def link(
        self, expected: Callable[[], str | None] = lambda: None, *, timeout_seconds: float | None = None
    ) -> Link:
        """A new link to the server with the ``expected`` run id, or to any.

        ``timeout_seconds`` bounds each of its round trips.
        """
        return Link(self._make_connection, timeout_seconds or self._timeout_seconds, expected)

    async def info(self, *sections: str) -> dict[str, Any]:
        """Redis's ``INFO``, parsed by the driver.

        Raises:
            RedisUnavailable: it did not answer.
        """
        client = Redis(connection_pool=self._pool)
        try:
            async with asyncio.timeout(self._timeout_seconds):
                return {k: v for s in sections for k, v in (await client.info(s)).items()}
        except (RedisError, OSError, TimeoutError) as error:
            raise RedisUnavailable(f"Redis: {error or type(error).__name__}") from error

    async def messages(self, *channels: bytes) -> AsyncIterator[tuple[bytes, bytes] | None]:
        """(channel, payload) of every message on the channels; None each time the subscription begins.

        Ends with an exception when the connection is lost; what was published in between is missed, so
        a caller treats None as "anything may have happened".

        Raises:
            RedisUnavailable: the connection failed.
        """
        client = Redis(connection_pool=self._pool)
        try:
            async with client.pubsub() as pubsub:
                await pubsub.subscribe(*channels)
                async with aclosing(pubsub.listen()) as stream:
                    async for message in stream:
                        if message["type"] == "subscribe":
                            yield None
                        elif message["type"] == "message":
                            yield message["channel"], message["data"]
        except (RedisError, OSError, TimeoutError) as error:
            raise RedisUnavailable(f"Redis: {error or type(error).__name__}") from error

    async def close(self) -> None:
        """Close idle connections."""
        await self._pool.disconnect()
