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

from buffer.model.record import Removal

_T = TypeVar("_T")


@dataclass(slots=True, frozen=True)
class Pending:
    """An unflushed entry: its position, its item's id (None: it is not an item), and what it removes."""

    position: int
    item_id: str | None
    removal: Removal | None


def removals(pending: Iterable[Pending]) -> list[Removal]:
    """What unflushed entries remove."""
    return [p.removal for p in pending if p.removal is not None]


def visible(position: int, removed: Sequence[Removal]) -> bool:
    """Whether an item at this position is still there."""
    return not any(removal.covers(position) for removal in removed)


def unflushed(pending: Sequence[Pending], flushed_through: int) -> list[Pending]:
    """The tail's items after a position, without those that later entries remove."""
    removed = removals(pending)
    return [
        p
        for p in pending
        if p.item_id is not None and p.position > flushed_through and visible(p.position, removed)
    ]


def between(pending: Sequence[Pending], after: int, before: int) -> list[Pending]:
    """The tail entries between two positions, both excluded."""
    return [p for p in pending if after < p.position < before]


def new_in_tail(pending: Sequence[Pending], flushed_through: int, known: Container[str]) -> list[Pending]:
    """The items that the tail adds to Postgres; ``known`` are those of its ids that are stored already.

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
