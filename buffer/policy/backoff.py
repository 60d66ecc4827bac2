"""How long to wait before another try."""

from __future__ import annotations

import random


def full_jitter(attempt: int, first_seconds: float, most_seconds: float) -> float:
    """Seconds before try number ``attempt`` (from 1): uniform between 0 and a bound that doubles.

    Source: "Exponential Backoff and Jitter", AWS Architecture Blog, 2015 (full jitter).
    """
    return random.uniform(0, min(most_seconds, first_seconds * 2 ** min(attempt - 1, 30)))
