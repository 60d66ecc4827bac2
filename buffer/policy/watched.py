"""Who is silent, judged by one clock alone: how long a counter was seen to stand still. Pure."""

from __future__ import annotations


class Watched:
    """How long counters stood still, by this process's own clock, while it could see them."""

    def __init__(self) -> None:
        self._seen: dict[str, tuple[int, float]] = {}

    def see(self, counters: dict[str, int], now: float) -> None:
        """Note what each counter is."""
        self._seen = {
            name: self._seen[name] if self._seen.get(name, (None,))[0] == count else (count, now)
            for name, count in counters.items()
        }

    def silent(self, seconds: float, now: float) -> dict[str, int]:
        """Those that stood still for longer, with their count."""
        return {name: count for name, (count, since) in self._seen.items() if now - since > seconds}

    def forget(self) -> None:
        """Begin anew: what happened in between is not known."""
        self._seen.clear()
