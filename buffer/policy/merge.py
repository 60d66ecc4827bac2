"""How Postgres's items and the unflushed tail become one sequence.

Each shard is flushed in stream order, so Postgres holds exactly the entries up to the shard's
flushed-through position F, which a read gets in the same snapshot as the rows. The tail was read first,
so it holds every entry that Postgres did not have then. Hence:

* tail entries at or before F are in Postgres, or were removed there: Postgres has the last word;
* tail entries after F are in no row: they are added, in order, with the removals that they carry;
* unless their id is stored already: a repeat that came after the idempotency window counts for nothing.

The result is one prefix of the conversation, whatever was flushed between the two reads.
"""

from __future__ import annotations

from collections.abc import Container, Iterable, Sequence
from dataclasses import dataclass
from typing import TypeVar

_T = TypeVar("_T")


@dataclass(slots=True, frozen=True)
class Removal:
    """Items after ``after`` and before ``before`` are removed, both excluded."""

    after: int
    before: int

    def covers(self, position: int) -> bool:
        """Whether an item at this position is removed."""
        return self.after < position < self.before


@dataclass(slots=True, frozen=True)
class Pending:
    """An unflushed item: its position, its id, what it removes, and whatever the caller carries along."""

    position: int
    item_id: str
    replace_after: int | None


def removals(pending: Iterable[Pending]) -> list[Removal]:
    """What unflushed entries remove."""
    return [Removal(p.replace_after, p.position) for p in pending if p.replace_after is not None]


def visible(position: int, removed: Sequence[Removal]) -> bool:
    """Whether an item at this position is still there."""
    return not any(removal.covers(position) for removal in removed)


def unflushed(pending: Sequence[Pending], flushed_through: int) -> list[Pending]:
    """The tail entries after a position, without those that later ones remove."""
    removed = removals(pending)
    return [p for p in pending if p.position > flushed_through and visible(p.position, removed)]


def between(pending: Sequence[Pending], after: int, before: int) -> list[Pending]:
    """The tail entries between two positions, both excluded."""
    return [p for p in pending if after < p.position < before]


def new_in_tail(pending: Sequence[Pending], flushed_through: int, known: Container[str]) -> list[Pending]:
    """What the tail adds to what Postgres has; ``known`` are those of its ids that are stored already.

    A repeat that came after the idempotency window adds nothing, and removes nothing either: its first
    appearance did.
    """
    return unflushed([p for p in pending if p.item_id not in known], flushed_through)


def newest_page(stored: Sequence[_T], new: Sequence[_T], limit: int) -> tuple[list[_T], bool]:
    """The newest ``limit`` of stored and new items, all oldest first; and whether there are older ones.

    ``stored`` holds at least the newest ``limit + 1`` that there are.
    """
    merged = [*stored, *new]
    return merged[-limit:], len(merged) > limit


def oldest_page(stored: Sequence[_T], new: Sequence[_T], limit: int) -> tuple[list[_T], bool]:
    """The oldest ``limit`` of stored and new items, oldest first; and whether there are newer ones.

    ``stored`` holds at least the oldest ``limit + 1`` that there are.
    """
    merged = [*stored, *new]
    return merged[:limit], len(merged) > limit
