"""When appends are turned away for lack of room, and when room is to be expected. Pure."""

from __future__ import annotations

import math
from dataclasses import dataclass

# How much of the latest observation goes into a rate.
_SMOOTHING = 0.3
_RETRY_FIRST_SECONDS = 0.5
_RETRY_MOST_SECONDS = 60.0
_RETRY_UNKNOWN_SECONDS = 5.0  # nothing drains, so nobody knows


class Gate:
    """Closes at the high-water mark, opens again at the low one."""

    def __init__(self, high: float, low: float) -> None:
        self.high = high
        self.low = low
        self.closed = False

    def see(self, used: float) -> bool:
        """Note how much is used; whether the gate is closed."""
        self.closed = used >= self.high or (self.closed and used > self.low)
        return self.closed


@dataclass(slots=True)
class Flow:
    """Rates of what comes in and what drains, from counters that only grow; in units a second."""

    inflow: float = 0.0
    drain: float = 0.0
    _in: float = 0.0
    _out: float = 0.0
    _at: float | None = None

    def see(self, total_in: float, total_out: float, now: float) -> None:
        """Note the counters. Counters that went back began anew."""
        if self._at is not None and now > self._at and total_in >= self._in and total_out >= self._out:
            seconds = now - self._at
            self.inflow += _SMOOTHING * ((total_in - self._in) / seconds - self.inflow)
            self.drain += _SMOOTHING * ((total_out - self._out) / seconds - self.drain)
        self._in, self._out, self._at = total_in, total_out, now


def seconds_to_full(used: float, high: float, flow: Flow) -> float:
    """When ``used`` reaches ``high`` if nothing changes: 0 if it has, infinite while it does not grow."""
    if used >= high:
        return 0.0
    growth = flow.inflow - flow.drain
    # Rates fade towards 0 and never reach it: growth that would take months is none.
    return (high - used) / growth if growth * 1e7 > high else math.inf


def retry_after(used: float, low: float, drain: float) -> float:
    """Seconds until ``used`` is down at ``low``, at the measured drain rate; bounded both ways."""
    if drain <= 0:
        return _RETRY_UNKNOWN_SECONDS
    return min(_RETRY_MOST_SECONDS, max(_RETRY_FIRST_SECONDS, (used - low) / drain))
