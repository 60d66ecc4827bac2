"""Whether what readers saw can have been: each read is one state that its conversation had at that time.

A conversation is what its events make of it, in the order of their positions. A read that began after an
event was acked has it; one that ended before an event was sent has not; in between it has all events up
to one of them, and none after that. Pure: times are whatever clock all of them share.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from itertools import accumulate
from typing import NamedTuple

NEVER = float("inf")

Shown = tuple[str, int]  # an item's id and position


class Event(NamedTuple):
    """Something that happened to a conversation.

    ``item_id``: an item was appended; None: something was removed. It removes what stands between ``after``
    and ``before``, both excluded; ``erases``: and the conversation begins anew. ``acked`` is `NEVER` for
    what ended without an answer.
    """

    position: int
    sent: float
    acked: float
    item_id: str | None = None
    after: int = 0
    before: int = 0
    erases: bool = False


class Read(NamedTuple):
    """What a read of the newest ``turns`` items gave; ``last``: the last position, -1 if it was not told."""

    began: float
    ended: float
    turns: int
    complete: bool
    last: int | None
    items: tuple[Shown, ...]


def states(events: Iterable[Event]) -> list[tuple[Shown, ...]]:
    """What the conversation held before the first event, and after each."""
    held: list[tuple[Shown, ...]] = [()]
    for event in events:
        kept = held[-1]
        if event.before:
            kept = tuple(item for item in kept if not event.after < item[1] < event.before)
        held.append(kept if event.item_id is None else (*kept, (event.item_id, event.position)))
    return held


def faults(events: Sequence[Event], reads: Iterable[Read]) -> list[str]:
    """What is wrong with the reads of one conversation, given everything that happened to it."""
    events = sorted(events)
    held = states(events)
    # Of the first n events: by when one of them was acked, sorted, with the most that must be seen then.
    by_ack = sorted((event.acked, n) for n, event in enumerate(events, 1))
    acks = [acked for acked, _ in by_ack]
    must_see = [0, *accumulate((n for _, n in by_ack), max)]
    by_sent = sorted((event.sent, n) for n, event in enumerate(events))
    sends = [sent for sent, _ in by_sent]
    may_see = list(accumulate((n for _, n in reversed(by_sent)), min, initial=len(events)))[::-1]
    found = []
    for read in reads:
        least = must_see[bisect_left(acks, read.began)]
        most = may_see[bisect_right(sends, read.ended)]
        if not read.complete:
            found.append(f"incomplete: {read}")
        elif not any(_shows(read, events, held, n) for n in range(least, most + 1)):
            found.append(_explained(read, events, held, least, most))
    return found


def _shows(read: Read, events: Sequence[Event], held: Sequence[tuple[Shown, ...]], n: int) -> bool:
    """Whether the read shows what the first n events made."""
    if read.items != held[n][-read.turns :]:
        return False
    last = None if not n or events[n - 1].erases else events[n - 1].position
    return read.last in {last, -1}


def _explained(
    read: Read, events: Sequence[Event], held: Sequence[tuple[Shown, ...]], least: int, most: int
) -> str:
    seen = [n for n in range(len(held)) if _shows(read, events, held, n)]
    ids = [item[0] for item in read.items]
    if len(set(ids)) < len(ids):
        what = "repeated"
    elif seen:
        what = "stale" if seen[0] < least else "from the future"
    else:
        what = "no state at all"
    allowed = [(held[n][-read.turns :], events[n - 1] if n else None) for n in range(least, most + 1)]
    return f"{what} (states {seen}, allowed {least} to {most}): {read}; it might have been {allowed[:3]}"


def moved(shown: Iterable[Mapping[str, int]]) -> list[str]:
    """Ids that were seen at two positions."""
    positions: dict[str, set[int]] = defaultdict(set)
    for mapping in shown:
        for item_id, position in mapping.items():
            positions[item_id].add(position)
    return [f"{item_id} stood at {sorted(at)}" for item_id, at in positions.items() if len(at) > 1]
