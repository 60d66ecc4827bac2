"""Dead letters: items that could not be stored, kept with their payload and the reason."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Literal, NamedTuple

from buffer.errors import NotFound
from buffer.model.codec import equal_as_json
from buffer.store import items, queries, stale_views
from buffer.store.items import Identity
from buffer.store.pool import BadRows, Connection, Database, DuplicateRows, translated

_SQL = queries.load("dead_letters")

Outcome = Literal["stored", "already stored", "refused"]


class DeadLetter(NamedTuple):
    """An item that cannot be stored, and why."""

    tenant: str
    conversation: str
    item_id: str
    position: int
    payload: bytes
    reason: str


@dataclass(slots=True, frozen=True)
class KeptLetter:
    """A dead letter as it is kept; ``id`` is its number."""

    id: int
    tenant: str
    conversation: str
    item_id: str
    position: int
    payload: bytes
    reason: str
    created_at: datetime


async def add(connection: Connection, letters: Sequence[DeadLetter]) -> set[Identity]:
    """Keep letters, within a transaction of the caller; which were new, and not removed or erased."""
    columns = list(zip(*letters, strict=True))
    with translated():
        kept = await connection.fetch(_SQL["add"], *columns)
    await stale_views.note(connection, [letter[:2] for letter in letters])
    return {(r["tenant"], r["conversation"], r["item_id"]) for r in kept}


async def holders(connection: Connection, conversations: Iterable[tuple[str, str]]) -> set[tuple[str, str]]:
    """Those of the (tenant, conversation) pairs that have dead letters."""
    with translated():
        rows = await connection.fetch(_SQL["holders"], *zip(*conversations, strict=True))
    return {(row["tenant"], row["conversation"]) for row in rows}


class DeadLetters:
    """What operators do with them."""

    def __init__(self, database: Database) -> None:
        self._database = database

    async def page(
        self, after: int = 0, limit: int = 100, tenant: str | None = None, conversation: str | None = None
    ) -> list[KeptLetter]:
        """Up to ``limit`` letters, oldest first."""
        async with self._database.connection() as connection:
            rows = await connection.fetch(_SQL["page"], after, limit, tenant, conversation)
        return [KeptLetter(**row) for row in rows]

    async def count(self) -> int:
        """How many there are."""
        async with self._database.connection() as connection:
            number: int = await connection.fetchval(_SQL["count"])
        return number

    async def show(self, number: int) -> KeptLetter:
        """One letter.

        Raises:
            NotFound: there is none of that number.
        """
        async with self._database.connection() as connection:
            return await _get(connection, number)

    async def drop(self, number: int) -> None:
        """Forget a letter and its payload.

        Raises:
            NotFound: there is none of that number.
        """
        async with self._database.transaction() as connection:
            if await connection.fetchval(_SQL["drop"], number) is None:
                raise NotFound(f"there is no dead letter {number}")

    async def retry(self, number: int) -> tuple[Outcome, str]:
        """Store a letter's item at its own position; the outcome, and the reason if it was refused.

        Raises:
            NotFound: there is none of that number.
        """
        try:
            async with self._database.transaction() as connection:
                letter = await _get(connection, number)
                outcome, reason = await _store(connection, letter)
                if outcome != "refused":
                    await connection.execute(_SQL["drop"], number)
                return outcome, reason
        except (BadRows, DuplicateRows) as error:
            return "refused", str(error)


async def _get(connection: Connection, number: int) -> KeptLetter:
    row = await connection.fetchrow(_SQL["get"], number)
    if row is None:
        raise NotFound(f"there is no dead letter {number}")
    return KeptLetter(**row)


async def _store(connection: Connection, letter: KeptLetter) -> tuple[Outcome, str]:
    identity = (letter.tenant, letter.conversation, letter.item_id)
    stored = await connection.fetchval(
        _SQL["store"],
        letter.tenant,
        letter.conversation,
        letter.position,
        letter.item_id,
        letter.created_at,
        letter.payload,
    )
    if stored is not None:
        return "stored", ""
    position, data = (await items.present(connection, [identity]))[identity]
    if data is not None and equal_as_json(letter.payload, data):
        return "already stored", ""
    why = "belongs to a removed item" if data is None else "is stored with another body"
    return "refused", f"the id {why}, at position {position}"
