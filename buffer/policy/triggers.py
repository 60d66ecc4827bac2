"""When a shard's backlog is flushed: by count, by bytes or by age, whichever comes first."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Trigger = Literal["count", "bytes", "age", "nudge"]


@dataclass(slots=True, frozen=True)
class Triggers:
    """The limits; see `buffer.settings.Settings` for their defaults."""

    max_turns: int
    max_bytes: int
    interval_seconds: float

    def due(self, turns: int, nbytes: int, waited_seconds: float, *, nudged: bool) -> Trigger | None:
        """Why to flush now, or None. ``waited_seconds``: since the oldest item was first noticed."""
        if turns <= 0:
            return None
        if nudged:
            return "nudge"
        if turns >= self.max_turns:
            return "count"
        if nbytes >= self.max_bytes:
            return "bytes"
        if waited_seconds >= self.interval_seconds:
            return "age"
        return None


def fetch_count(turns_left: int, bytes_left: int, backlog_turns: int, backlog_bytes: int) -> int:
    """How many entries to ask for, so that entries of average size fit the bytes that are left."""
    if turns_left <= 0 or bytes_left <= 0:
        return 0
    average = max(1, backlog_bytes // max(1, backlog_turns))
    return max(1, min(turns_left, bytes_left // average))
