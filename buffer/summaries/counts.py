"""Which conversations may need a summary, by what a flusher sees pass. Pure, and bounded."""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Container, Iterable, Mapping
from itertools import islice
from typing import Any

from buffer.store.shards import Owned

# Conversations that are remembered; forgetting one costs one look into Postgres.
_MOST = 100_000

# A tenure of this flusher over a shard: what others did in between is not counted.
_Tenure = tuple[int, int]


class Counts:
    """Counts, for each conversation, the items that no summary covers.

    A conversation that this flusher does not know, or no longer knows well, is to be looked up in Postgres:
    see `take`. So is one that has ``enough``, which makes it due.
    """

    def __init__(self, enough: int, keep: int) -> None:
        self.enough = enough
        self._keep = keep
        self._known: OrderedDict[bytes, tuple[_Tenure, int]] = OrderedDict()
        self._to_look_up: OrderedDict[bytes, _Tenure] = OrderedDict()

    def add(self, owned: Owned, keys: Iterable[bytes], changed: Container[bytes]) -> None:
        """Count items that were committed by their conversation's key; ``changed`` had items removed."""
        tenure = owned.path_epoch, owned.fence
        for key, added in Counter(keys).items():
            known = self._known.pop(key, None)
            if known is not None and known[0] == tenure and key not in changed:
                count = known[1] + added
                if count < self.enough:
                    self._known[key] = tenure, count
                    continue
            self._to_look_up[key] = tenure
        _bound(self._known)
        _bound(self._to_look_up)

    @property
    def waiting(self) -> int:
        """How many are to be looked up."""
        return len(self._to_look_up)

    def take(self, most: int) -> dict[bytes, _Tenure]:
        """Some of those that are to be looked up, to be given to `learn`, or to `put_back`."""
        taken = dict(islice(self._to_look_up.items(), most))
        for key in taken:
            del self._to_look_up[key]
        return taken

    def learn(self, taken: Mapping[bytes, _Tenure], uncovered: Mapping[bytes, int]) -> None:
        """What Postgres says of those that were taken. One with ``enough`` is queued by now."""
        for key, tenure in taken.items():
            if key not in self._to_look_up:  # if it is, there is more, which the answer may not know
                count = uncovered.get(key, 0)
                self._known[key] = tenure, self._keep if count >= self.enough else count
        _bound(self._known)

    def put_back(self, taken: Mapping[bytes, _Tenure]) -> None:
        """They are still to be looked up."""
        for key, tenure in taken.items():
            self._to_look_up.setdefault(key, tenure)
        _bound(self._to_look_up)


def _bound(entries: OrderedDict[bytes, Any]) -> None:
    while len(entries) > _MOST:
        entries.popitem(last=False)
