"""Redis as the protocol uses it: one shard with one conversation, and scripts that are each one step."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple

from tests.model.rules import Rule
from tests.model.schedule import Expected, Schedule

NEVER = -1_000_000


class Position(NamedTuple):
    """epoch << 40 | number, taken apart."""

    epoch: int
    number: int


class Item(NamedTuple):
    """What is stored under an id."""

    position: Position
    body: str


class Entry(NamedTuple):
    """One append in the stream."""

    position: Position
    item_id: str
    body: str


class Fence(NamedTuple):
    """What a manager leaves in place of the grant of an epoch that is over."""

    epoch: int
    nonce: int
    found: int | None


class Refused(Expected):
    """A script refused its caller."""


class Conflict(Expected):
    """The id is known with another body."""


class PreconditionFailed(Expected):
    """The last position is another one."""


class LastUnknown(Expected):
    """Nothing in Redis knows the last position."""


@dataclass
class RedisData:
    """What a crash may lose."""

    epoch: int | None = None
    fence: Fence | None = None
    members: set[str] = field(default_factory=set)
    stream: list[Entry] = field(default_factory=list)
    next_number: int = 0
    mark: int = -1
    window: dict[str, Item] = field(default_factory=dict)
    lease: int | None = None
    managers: dict[str, int] = field(default_factory=dict)

    def copy(self) -> RedisData:
        """The data as a file or a replica has it at this moment."""
        return RedisData(
            self.epoch,
            self.fence,
            set(self.members),
            list(self.stream),
            self.next_number,
            self.mark,
            dict(self.window),
            self.lease,
            dict(self.managers),
        )


class RedisServer:
    """One incarnation of a server; a restart makes another one."""

    def __init__(self, schedule: Schedule, run_id: int, data: RedisData, rules: frozenset[Rule]) -> None:
        self.schedule = schedule
        self.run_id = run_id
        self.data = data
        self.rules = rules
        self.up = True
        self.stopped = False

    def _admit(self, epoch: int, process: str | None) -> RedisData:
        data = self.data
        if data.epoch != epoch and Rule.GRANT_EPOCH in self.rules:
            raise Refused
        if process is not None and process not in data.members and Rule.GRANT_MEMBER in self.rules:
            raise Refused
        return data

    def append(
        self,
        epoch: int,
        process: str,
        item_id: str,
        body: str,
        if_match: Position | None,
        lease: int | None,
    ) -> tuple[Position, bool, int]:
        """Add an item, or find it; its position, whether it was known, and the mark."""
        data = self._admit(epoch, process)
        known = data.window.get(item_id)
        if known is not None:
            if known.body != body:
                raise Conflict
            return known.position, True, data.mark
        if if_match is not None:
            if data.stream:
                if data.stream[-1].position != if_match:
                    raise PreconditionFailed
            elif lease is None or (data.lease != lease and Rule.LEASE in self.rules):
                raise LastUnknown
        position = Position(epoch, data.next_number)
        data.next_number += 1
        data.stream.append(Entry(position, item_id, body))
        data.window[item_id] = Item(position, body)
        return position, False, data.mark

    def take_lease(self, epoch: int, process: str, lease: int) -> Position | None:
        """The last unflushed position; if there is none, the lease is the caller's."""
        data = self._admit(epoch, process)
        if data.stream:
            return data.stream[-1].position
        data.lease = lease
        return None

    def tail(self, epoch: int, process: str) -> tuple[list[Entry], int]:
        """The unflushed entries and the mark."""
        data = self._admit(epoch, process)
        return list(data.stream), data.mark

    def peek_mark(self, epoch: int, process: str) -> int:
        """The flushed-through number."""
        return self._admit(epoch, process).mark

    def join(self, epoch: int, process: str) -> None:
        """Become a member of the grant."""
        data = self._admit(epoch, None)
        data.members.add(process)

    def kick(self, epoch: int, process: str) -> Position:
        """Put a process out; the last position that was given out so far."""
        data = self._admit(epoch, None)
        data.members.discard(process)
        return Position(epoch, data.next_number - 1)

    def probe(self, epoch: int) -> Position:
        """Whether the grant stands; the last position that was given out."""
        return Position(epoch, self._admit(epoch, None).next_number - 1)

    def batch(self, epoch: int, count: int) -> tuple[int, list[Entry]]:
        """The mark and the oldest unflushed entries."""
        data = self._admit(epoch, None)
        return data.mark, data.stream[:count]

    def settle(self, epoch: int, before: int, after: int) -> None:
        """Forget what Postgres has."""
        data = self._admit(epoch, None)
        if data.mark != before and Rule.SETTLE_COMPARES in self.rules:
            return
        data.mark = after
        data.stream = [entry for entry in data.stream if entry.position.number > after]
        data.lease = None

    def put_up_fence(self, epoch: int, nonce: int) -> tuple[Fence, list[Entry]]:
        """End any older grant; the fence that stands, and what the stream holds."""
        data = self.data
        if data.epoch is not None and data.epoch > epoch:
            raise Refused
        if data.fence is None or data.fence.epoch < epoch:
            data.fence = Fence(epoch, nonce, data.epoch)
        data.epoch = None
        return data.fence, list(data.stream)

    def time(self) -> int:
        """This server's clock."""
        return self.schedule.now

    def report(self, epoch: int, manager: str, at: int) -> int:
        """A manager says that at that time of this server it was without Postgres; the time now."""
        data = self._admit(epoch, None)
        data.managers[manager] = max(at, data.managers.get(manager, NEVER))
        return self.schedule.now

    def without_postgres_since(self, epoch: int, process: str) -> int:
        """How many ticks ago the manager who was silent longest said that it is without Postgres."""
        data = self._admit(epoch, process)
        return self.schedule.now - min(data.managers.values(), default=NEVER)

    def standing_fence(self) -> Fence | None:
        """The fence, if there is one."""
        return self.data.fence

    def grant(self, epoch: int, fence: Fence, members: list[str], managers: list[str]) -> None:
        """Empty the shard and open it for an epoch."""
        data = self.data
        if Rule.GRANT_OVER_FENCE in self.rules:
            if data.fence != fence:
                return
        elif data.epoch is not None and data.epoch >= epoch:
            return
        self.data = RedisData(epoch=epoch, members=set(members), managers=dict.fromkeys(managers, NEVER))
