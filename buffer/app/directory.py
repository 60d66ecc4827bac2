"""The directory of conversations: made, described, and listed by user.

A conversation is there once it was created or appended to. Its row is in Postgres, where the flush of its
first items makes one; until then the unflushed items tell that it is there, and from when.
"""

from __future__ import annotations

from buffer.errors import Conflict, NotFound
from buffer.model.metadata import decode_metadata, encode_metadata
from buffer.model.types import ConversationInfo, ConversationPage
from buffer.read.lookup import Lookup
from buffer.store.conversations import ConversationRow, ConversationStore, Unflushed


class Directory:
    """All conversations, by tenant."""

    def __init__(self, lookup: Lookup, store: ConversationStore) -> None:
        self._lookup = lookup
        self._store = store

    async def create(
        self, tenant: str, conversation: str, user: str | None, metadata: object
    ) -> ConversationInfo:
        """Make a conversation; see `buffer.app.conversation.Conversation.create`."""
        data = encode_metadata(metadata)

        async def make(unflushed: Unflushed) -> ConversationRow | None:
            if unflushed.last:
                return None
            return await self._store.create(tenant, conversation, user, data, unflushed)

        row = await self._lookup.beside_the_tail(tenant, conversation, make)
        if row is None:
            raise Conflict(f"conversation {conversation!r} exists", ids=[conversation])
        return _info(row)

    async def info(self, tenant: str, conversation: str) -> ConversationInfo:
        """What is known of a conversation; see `buffer.app.conversation.Conversation.info`."""
        if row := await self._store.get(tenant, conversation):
            return _info(row)

        async def look(unflushed: Unflushed) -> ConversationInfo | None:
            if row := await self._store.get_beside(tenant, conversation, unflushed):
                return _info(row)
            if unflushed.created_at is None or unflushed.active_at is None:
                return None
            times = (unflushed.created_at, unflushed.active_at)
            return ConversationInfo(conversation, unflushed.user, {}, *times)

        found = await self._lookup.beside_the_tail(tenant, conversation, look)
        if found is None:
            raise _not_there(conversation)
        return found

    async def set_metadata(self, tenant: str, conversation: str, metadata: object) -> ConversationInfo:
        """Replace metadata; see `buffer.app.conversation.Conversation.set_metadata`."""
        data = encode_metadata(metadata)
        if row := await self._store.set_metadata(tenant, conversation, data):
            return _info(row)

        async def describe(unflushed: Unflushed) -> ConversationRow | None:
            if unflushed.last:
                return await self._store.describe(tenant, conversation, data, unflushed)
            # The flush of its items may have come between, and the erasure of it as well.
            row = await self._store.set_metadata(tenant, conversation, data)
            return row or await self._store.get_beside(tenant, conversation, unflushed)

        row = await self._lookup.beside_the_tail(tenant, conversation, describe)
        if row is None:
            raise _not_there(conversation)
        return _info(row)

    async def of_user(self, tenant: str, user: str, limit: int, after: str | None) -> ConversationPage:
        """One page of a user's conversations; see `buffer.app.buffer.Buffer.conversations`."""
        rows = await self._store.of_user(tenant, user, limit + 1, after)
        return ConversationPage([_info(row) for row in rows[:limit]], len(rows) > limit)


def _info(row: ConversationRow) -> ConversationInfo:
    return ConversationInfo(
        row.conversation, row.user, decode_metadata(row.metadata), row.created_at, row.active_at
    )


def _not_there(conversation: str) -> NotFound:
    return NotFound(f"there is no conversation {conversation!r}")
