"""Conversations in bulk: the look-ups of an import within its transaction, and the snapshot of an export."""

from __future__ import annotations

from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from contextlib import aclosing, asynccontextmanager
from dataclasses import dataclass
from datetime import datetime
from typing import NamedTuple

from buffer.store import queries
from buffer.store.items import StoredItem
from buffer.store.pool import Connection, Database, translated
from buffer.store.summaries import APPLICATION

_SQL = queries.load("transfer")

_TAKEN_WINDOW = 2_000

# Rows that an export holds at a time: an item may have 1 MiB.
_EXPORT_ROWS = 64
# A conversation with more items than this is read on its own.
_EXPORT_FIRST_ITEMS = 500


class ImportedConversation(NamedTuple):
    """A conversation as a file describes it.

    ``metadata`` is JSON, ``active_at`` the time of the last item.
    """

    tenant: str
    conversation: str
    user: str | None
    metadata: str | None
    created_at: datetime
    active_at: datetime


@dataclass(slots=True, frozen=True)
class ConversationState:
    """What Postgres holds of a conversation.

    ``metadata`` is None also where it is, letter for letter, what the import brings. ``erased``: it was
    erased, and so was whatever might be imported: an erasure covers every position before its own.
    """

    user: str | None
    metadata: str | None
    has_items: bool
    last_imported: int
    erased: bool


class StoredDigest(NamedTuple):
    """An item that is there already: its position, and its body's SHA-256 or None if it was removed."""

    position: int
    digest: bytes | None


@dataclass(slots=True, frozen=True)
class ExportedConversation:
    """A conversation's row; ``metadata`` is JSON."""

    tenant: str
    conversation: str
    user: str | None
    metadata: str | None
    created_at: datetime


async def lock_conversations(
    connection: Connection, wanted: Sequence[ImportedConversation], import_end: int
) -> list[ConversationState]:
    """Make what is missing, lock all until the transaction ends, and tell what they hold, in order.

    ``wanted`` names each conversation once. A user or metadata that is set stays as it is; the time of a
    conversation is the earliest that was ever given. Positions below ``import_end`` are import's.
    """
    tenants, conversations, users, metadata, began, active = zip(*wanted, strict=True)
    with translated():
        await connection.execute(
            _SQL["lock_conversations"], tenants, conversations, users, metadata, began, active
        )
        rows = await connection.fetch(_SQL["state"], tenants, conversations, metadata, import_end)
    return [ConversationState(*row) for row in rows]


async def digests(
    connection: Connection, ids: Sequence[tuple[str, str, str]]
) -> dict[tuple[str, str, str], StoredDigest]:
    """What is stored under these (tenant, conversation, item id)."""
    with translated():
        rows = await connection.fetch(_SQL["digests"], *zip(*ids, strict=True))
    return {tuple(row[:3]): StoredDigest(*row[3:]) for row in rows}


async def drop_summaries(connection: Connection, first: Sequence[tuple[str, str, int]]) -> None:
    """Drop summaries that lack new items: by (tenant, conversation), the first new item's position."""
    with translated():
        await connection.execute(_SQL["drop_summaries"], *zip(*first, strict=True), APPLICATION)


class TakenPositions:
    """The taken positions of one conversation, read in windows; ask for ascending positions only."""

    def __init__(self, connection: Connection, tenant: str, conversation: str) -> None:
        self._connection = connection
        self._of = (tenant, conversation)
        self._window: list[int] = []
        self._at = 0
        self._more = True

    async def first_free(self, position: int) -> int:
        """The first free position from this one on."""
        while True:
            while self._at < len(self._window) and self._window[self._at] <= position:
                position += self._window[self._at] == position
                self._at += 1
            if self._at < len(self._window) or not self._more:
                return position
            with translated():
                rows = await self._connection.fetch(_SQL["taken"], *self._of, position, _TAKEN_WINDOW)
            self._window = [row["position"] for row in rows]
            self._at = 0
            self._more = len(rows) == _TAKEN_WINDOW


class Snapshot:
    """Everything as it was at one moment."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection

    async def stream(
        self, tenant: str | None, user: str | None
    ) -> AsyncGenerator[ExportedConversation | StoredItem, None]:
        """Conversations by (tenant, conversation), each followed by its items by position."""
        cursor = await self._connection.cursor(_SQL["conversations"], tenant, user)
        while rows := await cursor.fetch(_EXPORT_ROWS):
            group = [ExportedConversation(*row) for row in rows]
            async with aclosing(self._with_items(group)) as stream:
                async for part in stream:
                    yield part

    async def _with_items(
        self, group: Sequence[ExportedConversation]
    ) -> AsyncGenerator[ExportedConversation | StoredItem, None]:
        begun = count = last = 0
        keys = [c.tenant for c in group], [c.conversation for c in group]
        cursor = await self._connection.cursor(_SQL["first_items"], *keys, _EXPORT_FIRST_ITEMS)
        while rows := await cursor.fetch(_EXPORT_ROWS):
            for n, *columns in rows:
                if n > begun:
                    if count == _EXPORT_FIRST_ITEMS:
                        async for item in self._rest(group[begun - 1], last):
                            yield item
                    for conversation in group[begun:n]:
                        yield conversation
                    begun, count = n, 0
                item = StoredItem(*columns)
                yield item
                count, last = count + 1, item.position
        if count == _EXPORT_FIRST_ITEMS:
            async for item in self._rest(group[begun - 1], last):
                yield item
        for conversation in group[begun:]:
            yield conversation

    async def _rest(self, of: ExportedConversation, after: int) -> AsyncGenerator[StoredItem, None]:
        while rows := await self._connection.fetch(
            _SQL["next_items"], of.tenant, of.conversation, after, _EXPORT_ROWS
        ):
            for row in rows:
                yield StoredItem(*row)
            after = rows[-1]["position"]


@asynccontextmanager
async def snapshot(database: Database) -> AsyncIterator[Snapshot]:
    """A transaction that reads one state of the database, for as long as it takes.

    Raises:
        PostgresUnavailable: also if the connection breaks on the way; so does any OSError from the inside.
    """
    async with (
        database.connection() as connection,
        connection.transaction(isolation="repeatable_read", readonly=True),
    ):
        # Whoever takes the rows may be slow.
        await connection.execute("set local idle_in_transaction_session_timeout = 0")
        yield Snapshot(connection)
