"""Named points at which a test or a drill can make this process die, as kill -9 does.

``BUFFER_CRASH_AT=flush.committed`` arms one. In production none is armed, and a point costs one comparison.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Iterable, Iterator
from typing import TypeVar

_T = TypeVar("_T")

POINTS = {
    "flush.before_read": "a batch is due and nothing was read",
    "flush.mid_copy": "a part of the batch's rows is on its way to Postgres",
    "flush.committed": "Postgres has the batch, Redis was not told",
    "flush.between_settles": "Redis has forgotten a part of the batch",
}

armed = os.environ.get("BUFFER_CRASH_AT", "")


def crash_point(name: str) -> None:
    """Die here if this point is armed."""
    if name == armed:
        os.kill(os.getpid(), signal.SIGKILL)


def crash_halfway(name: str, rows: Iterable[_T], count: int) -> Iterable[_T]:
    """The ``count`` rows; where the point is armed, an iterator that dies in the middle."""
    if name != armed:
        return rows

    def dying() -> Iterator[_T]:
        for index, row in enumerate(rows):
            if index >= count // 2:
                crash_point(name)
            yield row

    return dying()
