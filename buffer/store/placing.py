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
from buffer.model.record import ERASE, ITEM, Removal, removal
from buffer.store import dead_letters, items, queries, removals
from buffer.store.dead_letters import DeadLetter
from buffer.store.items import Identity, NewConversation
from buffer.store.pool import BadRows, Connection, DuplicateRows, translated
from buffer.store.removals import Cut, Erasure

_SQL = queries.load("placing")


class Placed(NamedTuple):
    """An entry with its position. ``data`` is an item's JSON; ``cut`` is what it removes, by its kind."""

    tenant: str
    conversation: str
    position: int
    item_id: str
    created_at: datetime
    data: bytes
    cut: int | None
    user: str | None
    kind: str = ITEM

    @property
    def identity(self) -> Identity:
        """What makes an entry the same: tenant, conversation, and the item's id, or else the position."""
        own = self.item_id if self.kind == ITEM else f"{self.kind}/{self.position}"
        return self.tenant, self.conversation, own

    @property
    def removal(self) -> Removal | None:
        """What it removes."""
        return removal(self.kind, self.cut, self.position)


async def place(connection: Connection, rows: Sequence[Placed]) -> set[Identity]:
    """Insert what is not there by its id, and remove what the entries remove; what was new.

    What a new erasure of the same rows erases counts as new: it was there for a moment.

    Raises:
        BadRows, DuplicateRows: Postgres refuses a row, or its position is taken; the transaction is broken.
    """
    new: set[Identity] = set()
    erased: dict[tuple[str, str], int] = {}
    for row in rows:
        if row.kind == ERASE:
            erased[row.identity[:2]] = max(row.position, erased.get(row.identity[:2], 0))
    if erased:
        erasures = [Erasure(r.tenant, r.conversation, r.position) for r in rows if r.kind == ERASE]
        fresh = {erasure[:2] for erasure in await removals.erase(connection, erasures)}
        new |= {
            r.identity
            for r in rows
            if r.position <= erased.get(r.identity[:2], -1) and r.identity[:2] in fresh
        }
        rows = [row for row in rows if row.position > erased.get(row.identity[:2], -1)]
    new_items = await _insert(connection, [row for row in rows if row.kind == ITEM])
    new |= new_items
    placed = [row for row in rows if row.identity in new_items]
    cuts = [
        Cut(r.tenant, r.conversation, r.position, *r.removal, None if r.kind == ITEM else r.item_id)
        for r in rows
        if r.removal is not None and (r.kind != ITEM or r.identity in new_items)
    ]
    if cuts:
        positions = await removals.remove(connection, cuts)
        new |= {r.identity for r in rows if r.kind != ITEM and r.position in positions}
    await _add_conversations(connection, placed)
    return new


async def _insert(connection: Connection, rows: Sequence[Placed]) -> set[Identity]:
    if not rows:
        return set()
    columns = zip(
        *((r.tenant, r.conversation, r.position, r.item_id, r.created_at, r.data) for r in rows), strict=True
    )
    with translated():
        stored = await connection.fetch(_SQL["place"], *columns)
    return {(r["tenant"], r["conversation"], r["item_id"]) for r in stored}


async def _add_conversations(connection: Connection, placed: Sequence[Placed]) -> None:
    conversations: dict[tuple[str, str], NewConversation] = {}
    for row in placed:
        known = conversations.get((row.tenant, row.conversation))
        user = row.user if known is None or known.user is None else known.user
        first = known.created_at if known else row.created_at
        last = max(known.active_at, row.created_at) if known else row.created_at
        conversations[row.tenant, row.conversation] = NewConversation(
            row.tenant, row.conversation, user, first, last
        )
    if conversations:
        await items.add_conversations(connection, list(conversations.values()))


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
    items_left = [row for row in rows if row.kind == ITEM and row.identity not in new]
    await set_aside(connection, items_left)
    return len(new)


async def _place_alone(connection: Connection, row: Placed) -> set[Identity]:
    try:
        async with connection.transaction():
            return await place(connection, [row])
    except (BadRows, DuplicateRows) as error:
        await _keep(connection, [row], [_letter(row, str(error))])
        return set()


async def set_aside(connection: Connection, rows: Sequence[Placed], why: str = "") -> int:
    """Keep items as dead letters, but for those that are stored, or whose id is stored with an equal body.

    How many were kept. ``why``: the reason for those whose id is not stored; without it they are dropped.
    """
    rows = [row for row in rows if row.kind == ITEM]
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
    await _keep(connection, rows, letters)
    return len(letters)


async def _keep(connection: Connection, rows: Sequence[Placed], letters: Sequence[DeadLetter]) -> None:
    """Dead letters of some rows. Their conversations are known, so that whoever erases a user finds them."""
    if letters:
        kept = await dead_letters.add(connection, letters)
        await _add_conversations(connection, [row for row in rows if row.identity in kept])


def _letter(row: Placed, reason: str) -> DeadLetter:
    return DeadLetter(*row.identity, row.position, row.data, reason)


async def last_positions(
    connection: Connection, conversations: Sequence[tuple[str, str]]
) -> dict[tuple[str, str], int]:
    """The last position of each (tenant, conversation) that has one, removed items included."""
    with translated():
        rows = await connection.fetch(_SQL["last_positions"], *zip(*conversations, strict=True))
    return {(r["tenant"], r["conversation"]): r["position"] for r in rows}
