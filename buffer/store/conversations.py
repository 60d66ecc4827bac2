"""Conversations' rows: made, described and listed one at a time.

A conversation may be there without a row, as long as all its items are unflushed. Whoever decides by that
says what it saw of the tail (`Unflushed`), and the transaction looks whether it is still so.
"""

from __future__ import annotations

from datetime import datetime
from typing import NamedTuple

from buffer.errors import BufferError, NotFound, Unavailable
from buffer.store import queries
from buffer.store.pool import Connection, Database, translated

_SQL = queries.load("conversations")


class Outdated(BufferError):
    """What the caller saw of the tail is not so any more; nothing was changed. Look again."""


class ConversationRow(NamedTuple):
    """A row; ``metadata`` is JSON, or None."""

    conversation: str
    user: str | None
    metadata: str | None
    created_at: datetime
    active_at: datetime


class Unflushed(NamedTuple):
    """A conversation's unflushed items, and the path by which they were read; ``last`` 0: there are none.

    ``user``, ``created_at`` and ``active_at`` are what a flush of them would give the conversation's row.
    """

    shard: int
    epoch: int
    mode: str
    last: int
    user: str | None
    created_at: datetime | None
    active_at: datetime | None


class ConversationStore:
    """The rows of conversations."""

    def __init__(self, database: Database) -> None:
        self._database = database

    async def get(self, tenant: str, conversation: str) -> ConversationRow | None:
        """A conversation's row."""
        async with self._database.connection() as connection:
            return _row(await connection.fetchrow(_SQL["get"], tenant, conversation))

    async def get_beside(
        self, tenant: str, conversation: str, unflushed: Unflushed
    ) -> ConversationRow | None:
        """A conversation's row, as it stands beside what is unflushed.

        Raises:
            Outdated: the path has changed since the tail was read.
            Unavailable: there is no row, and a process is missing that may know more.
        """
        async with self._database.transaction() as connection:
            row = _row(await connection.fetchrow(_SQL["get"], tenant, conversation))
            if row is None:
                await _still(connection, tenant, conversation, unflushed)
        return row

    async def create(
        self, tenant: str, conversation: str, user: str | None, metadata: str | None, unflushed: Unflushed
    ) -> ConversationRow | None:
        """Make a row; None if there is one. ``unflushed`` shows no item.

        Raises:
            Outdated, Unavailable: as in `get_beside`.
        """
        async with self._database.transaction() as connection:
            with translated():
                row = _row(await connection.fetchrow(_SQL["create"], tenant, conversation, user, metadata))
            if row is not None:
                await _still(connection, tenant, conversation, unflushed)
        return row

    async def set_metadata(
        self, tenant: str, conversation: str, metadata: str | None
    ) -> ConversationRow | None:
        """Replace the metadata of a conversation; None if it has no row."""
        async with self._database.transaction() as connection:
            with translated():
                return _row(await connection.fetchrow(_SQL["set_metadata"], tenant, conversation, metadata))

    async def describe(
        self, tenant: str, conversation: str, metadata: str | None, unflushed: Unflushed
    ) -> ConversationRow:
        """Replace the metadata of a conversation that may have no row yet, but has unflushed items.

        Raises:
            Outdated, Unavailable: as in `get_beside`; Outdated also if those items were erased.
        """
        of = (unflushed.user, unflushed.created_at, unflushed.active_at)
        async with self._database.transaction() as connection:
            with translated():
                row = _row(await connection.fetchrow(_SQL["describe"], tenant, conversation, metadata, *of))
            assert row is not None
            # After the insert: a flush locks in this order, too.
            await _still(connection, tenant, conversation, unflushed)
        return row

    async def of_user(self, tenant: str, user: str, limit: int, after: str | None) -> list[ConversationRow]:
        """Up to ``limit`` conversations of a user, newest activity first, after one of them.

        Raises:
            NotFound: the user has no conversation ``after``.
        """
        async with self._database.connection() as connection:
            active_at = None
            if after is not None:
                active_at = await connection.fetchval(_SQL["activity"], tenant, user, after)
                if active_at is None:
                    raise NotFound(f"after: user {user!r} has no conversation {after!r}")
            rows = await connection.fetch(_SQL["of_user"], tenant, user, limit, active_at, after)
        return [ConversationRow(*row) for row in rows]


def _row(row: object) -> ConversationRow | None:
    return None if row is None else ConversationRow(*row)  # type: ignore[misc]


async def _still(connection: Connection, tenant: str, conversation: str, unflushed: Unflushed) -> None:
    """The tail that the caller saw belongs to what is here, until this transaction ends."""
    with translated():
        now = await connection.fetchrow(_SQL["still"], unflushed.shard, tenant, conversation)
    assert now is not None
    if (now["path_epoch"], now["mode"]) != (unflushed.epoch, unflushed.mode):
        raise Outdated("the path has changed")
    if unflushed.last:
        if now["erased"] >= unflushed.last:
            raise Outdated("the conversation was erased")
    elif not now["clean"]:
        raise Unavailable("a part of the conversation may be with a process that is missing", retry_after=1.0)
