"""Waiting for what has no event: poll with a deadline, never sleep a fixed time."""

from __future__ import annotations

import asyncio
import inspect
import time
from collections.abc import Awaitable, Callable
from typing import TypeVar

_T = TypeVar("_T")


async def eventually(
    condition: Callable[[], Awaitable[_T] | _T], *, seconds: float = 15.0, every_seconds: float = 0.02
) -> _T:
    """The first true value of ``condition``, which may be a coroutine function; fails after ``seconds``."""
    deadline = time.monotonic() + seconds
    while True:
        value = condition()
        if inspect.isawaitable(value):
            value = await value
        if value:
            return value
        assert time.monotonic() < deadline, f"not within {seconds} s; the last value was {value!r}"
        await asyncio.sleep(every_seconds)
