"""One transaction of an import: what is there is found out under locks, the rest gets its place, one COPY.

The conversations' rows are locked first, in one order, so that imports never wait for each other in a
circle, and what is then read of those conversations stays true: an erasure waits for them as well. Only a
flush can still bring one of the same ids in between; then the transaction is done again. It is also done
again without the conversations that turn out to be erased, of which nothing is brought back.
"""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import Literal, NamedTuple

from buffer.errors import PostgresUnavailable
from buffer.model.codec import equal_as_json
from buffer.model.position import IMPORT_EPOCH, pack
from buffer.policy.backoff import full_jitter
from buffer.store import items, stale_views, transfer
from buffer.store.items import Row
from buffer.store.pool import BadRows, Connection, Database, DuplicateRows
from buffer.store.transfer import ConversationState, ImportedConversation, StoredDigest, TakenPositions
from buffer.transfer.line import Line, LineItem

# The first position that is not for imports.
IMPORT_END = pack(IMPORT_EPOCH + 1, 0)

_SHOWN_CHARACTERS = 500
_BODIES_AT_A_TIME = 50
# Nine waits of up to 0.05, 0.1, 0.2 ... 3 s: up to some 15 s for a restart of Postgres.
_ATTEMPTS = 10
_FIRST_RETRY_SECONDS = 0.05
_MOST_RETRY_SECONDS = 3.0

_Key = tuple[str, str, str]


@dataclass(slots=True, frozen=True)
class Problem:
    """Something of the file that was not stored.

    ``rejected``: the whole line. ``conflict``: an item, a user or metadata that differs from what is
    stored, which stays as it is. ``param`` names the field, as in ``items[3].id``; None is the line.
    """

    line: int
    kind: Literal["rejected", "conflict"]
    param: str | None
    message: str

    def __str__(self) -> str:
        """One line that a terminal can take, whatever the file holds."""
        text = f"line {self.line}: {self.message}"[:_SHOWN_CHARACTERS]
        return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


@dataclass(slots=True)
class Part:
    """Consecutive items of a line, from ordinal ``start``, to stand after position ``floor`` (0: none)."""

    line: Line
    items: Sequence[LineItem]
    start: int = 0
    floor: int = 0

    @property
    def active_at(self) -> datetime:
        """When the last of the items was created."""
        return max((item.created_at for item in self.items), default=self.line.created_at)

    def key(self, item: LineItem) -> _Key:
        """(tenant, conversation, item id)."""
        return self.line.tenant, self.line.conversation, item.item_id


class _ErasedError(Exception):
    """Rolls a transaction back that was about to touch conversations that are erased."""

    def __init__(self, keys: set[tuple[str, str]]) -> None:
        super().__init__()
        self.keys = keys


@dataclass(slots=True)
class Outcome:
    """What a transaction did. ``last`` is the position of its last part's last item."""

    stored: int = 0
    known: int = 0
    removed: int = 0
    erased: int = 0
    last: int = 0
    problems: list[Problem] = field(default_factory=list)

    @property
    def rejected(self) -> int:
        """How many lines were refused."""
        return sum(problem.kind == "rejected" for problem in self.problems)

    def conflict(self, part: Part, param: str, message: str) -> None:
        """Count a difference from what is stored."""
        self.problems.append(Problem(part.line.number, "conflict", param, message))


async def store(database: Database, parts: Sequence[Part]) -> Outcome:
    """Store parts of different conversations in one transaction.

    Where Postgres refuses a row, all conversations but that row's are stored, in several transactions.

    Raises:
        PostgresUnavailable: it stayed away for several tries.
        StoreRefused, SchemaMismatch: somebody has to act.
    """
    try:
        return await _until_stored(database, parts)
    except _ErasedError as error:
        left = [part for part in parts if part.line.key not in error.keys]
        outcome = await store(database, left) if left else Outcome()
        outcome.erased += sum(len(part.items) for part in parts if part.line.key in error.keys)
        return outcome
    except BadRows as error:
        if len(parts) == 1:
            param = f"items[{parts[0].start}]" if parts[0].start else None
            message = f"from {param} on: {error}" if param else str(error)
            problem = Problem(parts[0].line.number, "rejected", param, message)
            return Outcome(problems=[problem])
        half = len(parts) // 2
        one, other = await store(database, parts[:half]), await store(database, parts[half:])
        return Outcome(
            one.stored + other.stored,
            one.known + other.known,
            one.removed + other.removed,
            one.erased + other.erased,
            other.last,
            one.problems + other.problems,
        )


async def _until_stored(database: Database, parts: Sequence[Part]) -> Outcome:
    for attempt in range(1, _ATTEMPTS):
        try:
            return await _transaction(database, parts)
        except (DuplicateRows, PostgresUnavailable):
            # Also a deadlock with a flush. A commit whose answer was lost is found stored the next time.
            await asyncio.sleep(full_jitter(attempt, _FIRST_RETRY_SECONDS, _MOST_RETRY_SECONDS))
    return await _transaction(database, parts)


async def _transaction(database: Database, parts: Sequence[Part]) -> Outcome:
    described = [
        ImportedConversation(
            *part.line.key, part.line.user, part.line.metadata, part.line.created_at, part.active_at
        )
        for part in parts
    ]
    outcome = Outcome()
    rows: list[Row] = []
    unlike: list[_Unlike] = []
    inserted: list[tuple[str, str, int]] = []
    async with database.transaction() as connection:
        states = await transfer.lock_conversations(connection, described, IMPORT_END)
        both = list(zip(parts, states, strict=True))
        if erased := {part.line.key for part, state in both if state.erased}:
            raise _ErasedError(erased)
        maybe = [part.key(item) for part, state in both if state.has_items for item in part.items]
        there = await transfer.digests(connection, maybe) if maybe else {}
        for part, state in both:
            if part.start == 0:
                _compare_conversation(part, state, outcome)
            placement = _Placement(connection, part, state.last_imported, outcome)
            await placement.place(there)
            rows += placement.rows
            unlike += placement.unlike
            if placement.rows and state.has_items:
                inserted.append((*part.line.key, min(row.position for row in placement.rows)))
        await _compare_bodies(connection, unlike, outcome)
        if rows:
            await items.copy_rows(connection, rows)
            await stale_views.note(connection, [row[:2] for row in rows])
        if inserted:
            await transfer.drop_summaries(connection, inserted)
    outcome.stored = len(rows)
    return outcome


class _Unlike(NamedTuple):
    """An item whose id is stored with another text, which may be equal as JSON, or was removed."""

    part: Part
    ordinal: int
    item: LineItem


class _Placement:
    """Sorts out a part's items: new ones become rows with positions, the rest is counted."""

    def __init__(self, connection: Connection, part: Part, last_imported: int, outcome: Outcome) -> None:
        self._part = part
        self._last_imported = last_imported
        self._taken = TakenPositions(connection, *part.line.key)
        self._outcome = outcome
        self._new: dict[str, str] = {}
        self._last = part.floor
        self.rows: list[Row] = []
        self.unlike: list[_Unlike] = []

    async def place(self, there: Mapping[_Key, StoredDigest]) -> None:
        """Go through all items, in order."""
        part = self._part
        for ordinal, item in enumerate(part.items, start=part.start):
            found = there.get(part.key(item))
            if found is not None:
                self._found(ordinal, item, found)
            elif item.item_id in self._new:
                _compare(self._outcome, _Unlike(part, ordinal, item), self._new[item.item_id])
            else:
                await self._add(ordinal, item)
        self._outcome.last = self._last

    def _found(self, ordinal: int, item: LineItem, found: StoredDigest) -> None:
        if found.position < IMPORT_END:
            self._last = max(self._last, found.position)
        if found.digest == hashlib.sha256(item.data.encode()).digest():
            self._outcome.known += 1
        else:
            self.unlike.append(_Unlike(self._part, ordinal, item))

    async def _add(self, ordinal: int, item: LineItem) -> None:
        if item.wanted is not None:
            position = max(item.wanted, self._last + 1)
        else:
            position = (self._last or self._last_imported) + 1
        if position <= self._last_imported:
            position = await self._taken.first_free(position)
        if position >= IMPORT_END:
            param = f"items[{ordinal}]"
            self._outcome.conflict(self._part, param, f"{param}: no position is left before those of 2038")
            return
        tenant, conversation = self._part.line.key
        self.rows.append(Row(tenant, conversation, position, item.item_id, item.created_at, item.data))
        self._new[item.item_id] = item.data
        self._last = position


def _compare_conversation(part: Part, state: ConversationState, outcome: Outcome) -> None:
    line = part.line
    if line.user is not None and line.user != state.user:
        message = f"user is {line.user!r}; the conversation is stored with {state.user!r}"
        outcome.conflict(part, "user", message)
    if line.metadata and state.metadata and not equal_as_json(line.metadata, state.metadata):
        outcome.conflict(part, "metadata", "metadata: the conversation is stored with other metadata")


async def _compare_bodies(connection: Connection, unlike: Sequence[_Unlike], outcome: Outcome) -> None:
    for at in range(0, len(unlike), _BODIES_AT_A_TIME):
        some = unlike[at : at + _BODIES_AT_A_TIME]
        there = await items.present(connection, list({one.part.key(one.item) for one in some}))
        for one in some:
            _compare(outcome, one, there[one.part.key(one.item)][1])


def _compare(outcome: Outcome, one: _Unlike, stored: str | None) -> None:
    if stored is None:
        outcome.removed += 1
    elif equal_as_json(one.item.data, stored):
        outcome.known += 1
    else:
        param = f"items[{one.ordinal}]"
        outcome.conflict(one.part, param, f"{param}: {one.item.item_id!r} is stored with another body")
