"""Rows put at positions that they have already: spilled, salvaged, or appended directly.

Within a transaction of a caller who has the shard's row locked, so that two placements never meet. An id
that is there already is left alone; an item that a later one replaces is stored as removed, whichever of
the two arrives first.
"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime
from typing import NamedTuple

from buffer.model.codec import equal_as_json
from buffer.store import dead_letters, items, queries
from buffer.store.dead_letters import DeadLetter
from buffer.store.items import Cut, Identity, NewConversation
from buffer.store.pool import BadRows, Connection, DuplicateRows, translated

_SQL = queries.load("placing")


class Placed(NamedTuple):
    """An item with its position. ``data`` is its JSON; ``replace_after`` a position, or None."""

    tenant: str
    conversation: str
    position: int
    item_id: str
    created_at: datetime
    data: bytes
    replace_after: int | None
    user: str | None

    @property
    def identity(self) -> Identity:
        """What makes an item the same item: tenant, conversation, item id."""
        return self.tenant, self.conversation, self.item_id


async def place(connection: Connection, rows: Sequence[Placed]) -> set[Identity]:
    """Insert what is not there by its id; what was new.

    Raises:
        BadRows, DuplicateRows: Postgres refuses a row, or its position is taken; the transaction is broken.
    """
    columns = zip(
        *((r.tenant, r.conversation, r.position, r.item_id, r.created_at, r.data) for r in rows), strict=True
    )
    with translated():
        stored = await connection.fetch(_SQL["place"], *columns)
    new: set[Identity] = {(r["tenant"], r["conversation"], r["item_id"]) for r in stored}
    placed = [row for row in rows if row.identity in new]
    cuts = [
        Cut(r.tenant, r.conversation, r.replace_after, r.position)
        for r in placed
        if r.replace_after is not None
    ]
    if cuts:
        await items.remove_between(connection, cuts)
    conversations: dict[tuple[str, str], NewConversation] = {}
    for row in placed:
        known = conversations.get((row.tenant, row.conversation))
        if known is None or (known.user is None and row.user is not None):
            created_at = known.created_at if known else row.created_at
            conversations[row.tenant, row.conversation] = NewConversation(
                row.tenant, row.conversation, row.user, created_at
            )
    if conversations:
        await items.add_conversations(connection, list(conversations.values()))
    return new


async def place_acked(connection: Connection, rows: Sequence[Placed]) -> int:
    """Insert what was acked, and must not be lost: what cannot be stored becomes a dead letter.

    How many were new. A row that Postgres refuses does not stop the others.
    """
    try:
        async with connection.transaction():
            new = await place(connection, rows)
    except (BadRows, DuplicateRows):
        new = set()
        for row in rows:
            new |= await _place_alone(connection, row)
    await set_aside(connection, [row for row in rows if row.identity not in new])
    return len(new)


async def _place_alone(connection: Connection, row: Placed) -> set[Identity]:
    try:
        async with connection.transaction():
            return await place(connection, [row])
    except (BadRows, DuplicateRows) as error:
        await dead_letters.add(connection, [_letter(row, str(error))])
        return set()


async def set_aside(connection: Connection, rows: Sequence[Placed], why: str = "") -> int:
    """Keep rows as dead letters, but for those that are stored, or whose id is stored with an equal body.

    How many were kept. ``why``: the reason for those whose id is not stored; without it they are dropped.
    """
    if not rows:
        return 0
    stored = await items.present(connection, [row.identity for row in rows])
    letters = []
    for row in rows:
        if row.identity not in stored:
            if why:
                letters.append(_letter(row, why))
            continue
        position, data = stored[row.identity]
        if position != row.position and (data is None or not equal_as_json(row.data, data)):
            letters.append(_letter(row, f"the id is stored with another body, at position {position}"))
    if letters:
        await dead_letters.add(connection, letters)
    return len(letters)


def _letter(row: Placed, reason: str) -> DeadLetter:
    return DeadLetter(*row.identity, row.position, row.data, reason)


async def last_positions(
    connection: Connection, conversations: Sequence[tuple[str, str]]
) -> dict[tuple[str, str], int]:
    """The last position of each (tenant, conversation) that has one, removed items included."""
    with translated():
        rows = await connection.fetch(_SQL["last_positions"], *zip(*conversations, strict=True))
    return {(r["tenant"], r["conversation"]): r["position"] for r in rows}
