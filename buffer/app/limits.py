"""Limits of what one call may ask for."""

from __future__ import annotations

from buffer.errors import InvalidRequest

MAX_PAGE_ITEMS = 1_000


def check_count(value: int, param: str) -> None:
    """Return if a page may have so many.

    Raises:
        InvalidRequest: it may not; the message names the limit.
    """
    if not isinstance(value, int) or not 1 <= value <= MAX_PAGE_ITEMS:
        raise InvalidRequest(f"{param} must be 1 to {MAX_PAGE_ITEMS}", param=param)
