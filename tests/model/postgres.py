"""Postgres as the protocol uses it: the path row, the registry of processes, and the items.

Every public method is one transaction. The first thing that each does is to lock the path row, so that
they are serial; here they are because a step is atomic.
"""

from __future__ import annotations

from enum import Enum
from typing import NamedTuple

from tests.model.redis_server import Conflict, Entry, Fence, Item, Position, PreconditionFailed
from tests.model.rules import Rule
from tests.model.schedule import Expected, Schedule

# A process that was not heard of for so long may be judged dead, and what it holds written off.
HEARTBEAT_TICKS = 400
WRITE_OFF_TICKS = 1600
# A manager that was not seen for so long has lost touch, and begins anew to wait for heartbeats ...
OUT_OF_TOUCH_TICKS = HEARTBEAT_TICKS // 2
# ... and this long after a look its judgement still counts.
JUDGEMENT_TICKS = HEARTBEAT_TICKS * 3 // 10
OWNER_LEASE_TICKS = 600

NOTHING = Position(0, 0)


class Mode(Enum):
    """Where appends go."""

    STREAM = "stream"
    CLOSING = "closing"
    DIRECT = "direct"


class Missing(NamedTuple):
    """A process that may hold what it acked in the last stream epoch, and was not heard of since."""

    name: str
    since: int


class Path(NamedTuple):
    """The row that says which path is open."""

    epoch: int
    mode: Mode
    run_id: int
    fence: Fence | None = None
    missing: tuple[Missing, ...] = ()

    @property
    def clean(self) -> bool:
        """Whether everything that was acked is where a reader can find it."""
        return not self.missing

    def at(self, epoch: int, mode: Mode) -> bool:
        """Whether this is still that epoch and mode."""
        return self.epoch == epoch and self.mode is mode


class Registration(NamedTuple):
    """An accepting process."""

    heartbeat_at: int
    confirmed: int


class Manager(NamedTuple):
    """A path manager: when it was seen last, and since when without a break."""

    seen_at: int
    since: int


class Unclean(Expected):
    """The last position may be unknown."""


class Stale(Expected):
    """The path row has moved on."""


class Postgres:
    """The durable store: it may be away, and loses nothing."""

    def __init__(self, schedule: Schedule, rules: frozenset[Rule], run_id: int) -> None:
        self.schedule = schedule
        self.rules = rules
        self.path = Path(1, Mode.STREAM, run_id)
        self.processes: dict[str, Registration] = {}
        self.managers: dict[str, Manager] = {}
        self.items: dict[str, Item] = {}
        self.flushed_through = NOTHING
        self.next_direct = 0
        self.owner: str | None = None
        self.fence = 0
        self.lease_until = 0
        self.dead_letters: list[Entry] = []
        self.ever_missing: set[str] = set()
        self.written_off: set[str] = set()
        self.broken: list[str] = []
        self.away_ticks: list[tuple[int, int]] = []

    # ----- accepting processes

    def heartbeat(self, name: str) -> tuple[Path, Registration | None]:
        """Say that the process lives; the path, and what the registry has of it."""
        known = self.processes.get(name)
        if known is not None:
            self.processes[name] = known._replace(heartbeat_at=self.schedule.now)
        return self.path, known

    def spill(self, items: dict[str, Item]) -> None:
        """Insert retained items at their own positions."""
        for item_id, item in items.items():
            self._insert(Entry(item.position, item_id, item.body))

    def confirm(self, name: str, epoch: int, items: dict[str, Item]) -> None:
        """Spill, and with it confirm that nothing is acked any more in an older epoch."""
        known = self.processes.get(name)
        if known is None or not self.path.at(epoch, Mode.CLOSING):
            return
        self.spill(items)
        self.processes[name] = known._replace(confirmed=epoch, heartbeat_at=self.schedule.now)

    def rejoin(self, name: str, seen: Path, items: dict[str, Item]) -> bool:
        """Register anew, and spill what was retained of older epochs; False if the path moved on."""
        if name in self.processes or not self.path.at(seen.epoch, seen.mode):
            return False
        if any(m.name == name for m in self.path.missing) or Rule.WRITTEN_OFF not in self.rules:
            self.spill(items)
        else:
            self._keep_aside(items)
        self.processes[name] = Registration(self.schedule.now, seen.epoch)
        self.path = self.path._replace(missing=tuple(m for m in self.path.missing if m.name != name))
        return True

    def look_up(self, item_id: str) -> Item | None:
        """What is stored under an id."""
        return self.items.get(item_id)

    def last_position(self) -> tuple[Path, Position]:
        """The last position of the conversation, and the path in the same snapshot."""
        return self.path, self._last()

    def read(self) -> tuple[Path, Position, list[Entry]]:
        """The whole conversation in order, with the path and flushed-through of the same snapshot."""
        rows = [Entry(item.position, item_id, item.body) for item_id, item in self.items.items()]
        rows.sort()
        return self.path, self.flushed_through, rows

    def take_number(self) -> int:
        """A number outside of the transaction that uses it: what Rule.DIRECT_NUMBERS forbids."""
        self.next_direct += 1
        return self.next_direct

    def append_direct(
        self, epoch: int, item_id: str, body: str, if_match: Position | None, number: int | None
    ) -> Position:
        """Append without Redis."""
        if not self.path.at(epoch, Mode.DIRECT) and Rule.DIRECT_CHECKS_PATH in self.rules:
            raise Stale
        known = self.items.get(item_id)
        if known is not None and Rule.DIRECT_ONCE in self.rules:
            if known.body != body:
                raise Conflict
            return known.position
        if if_match is not None:
            if not self.path.clean and Rule.IF_MATCH_CLEAN in self.rules:
                raise Unclean
            if self._last() != if_match:
                raise PreconditionFailed
        position = Position(epoch, self.take_number() if number is None else number)
        self._insert(Entry(position, item_id, body), once=Rule.DIRECT_ONCE in self.rules)
        return position

    # ----- flushers

    def own(self, name: str) -> tuple[Path, int | None]:
        """Take or keep the ownership of the shard; the path, and the fence if it is the caller's."""
        now = self.schedule.now
        if self.owner != name:
            if now < self.lease_until:
                return self.path, None
            self.owner = name
            self.fence += 1
        self.lease_until = now + OWNER_LEASE_TICKS
        return self.path, self.fence

    def flush(self, fence: int, epoch: int, entries: list[Entry]) -> bool:
        """Insert a batch and record how far it goes; False if the caller may not."""
        return self.flush_rows(fence, epoch, entries) and self.flush_mark(fence, epoch, entries)

    def flush_rows(self, fence: int, epoch: int, entries: list[Entry]) -> bool:
        """Insert a batch."""
        if not self._may_flush(fence, epoch):
            return False
        for entry in entries:
            self._insert(entry, once=Rule.FLUSH_ONCE in self.rules)
        return True

    def flush_mark(self, fence: int, epoch: int, entries: list[Entry]) -> bool:
        """Record how far a batch goes."""
        if not self._may_flush(fence, epoch):
            return False
        self.flushed_through = max(self.flushed_through, entries[-1].position)  # a batch may be a repeat
        return True

    # ----- the managers of the path

    def look(self, name: str, *, out_of_touch: bool) -> tuple[Path, int, list[str]]:
        """The path, the time, and the processes whose heartbeat has run out, if the caller may judge that."""
        now = self.schedule.now
        known = self.managers.get(name)
        if known is None or out_of_touch or now - known.seen_at > OUT_OF_TOUCH_TICKS:
            known = Manager(now, now)
        self.managers[name] = known._replace(seen_at=now)
        if Rule.WRITE_OFF_SALVAGED not in self.rules:
            self._write_off()
        if not self._patient(name, now):
            return self.path, now, []
        expired = [(process, known) for process, known in self.processes.items() if self._expired(known)]
        for process, registration in expired:
            self._judge(process, registration)
        return self.path, now, [process for process, _ in expired]

    def close(self, seen: Path) -> None:
        """Stream to closing, in a new epoch."""
        if Rule.CLOSE_COMPARES in self.rules and not self.path.at(seen.epoch, Mode.STREAM):
            return
        self.path = self.path._replace(epoch=seen.epoch + 1, mode=Mode.CLOSING)

    def open_direct(self, manager: str, seen_at: int, epoch: int) -> None:
        """Closing to direct, once nobody is left who may ack in the old epoch."""
        if not self.path.at(epoch, Mode.CLOSING):
            return
        late = [(name, known) for name, known in self.processes.items() if known.confirmed < epoch]
        if Rule.SPILL_BARRIER in self.rules:
            if late and not self._patient(manager, seen_at):
                return
            if not all(self._expired(known) for _, known in late):
                return
            for name, known in late:
                self._give_up_on(name, known)
        self.path = self.path._replace(mode=Mode.DIRECT)
        self.next_direct = 0

    def go_back(
        self, epoch: int, run_id: int, fence: Fence, held: list[Entry], *, held_all: bool
    ) -> tuple[Path, list[str], list[str]] | None:
        """Salvage what a fenced server held and, if that makes it clean, open the stream there.

        Returns: the path, and for whom the grant is; None if the path has moved on.
        """
        if not self.path.at(epoch, Mode.DIRECT):
            return None
        for entry in held:
            if self._worth_salvaging(entry):
                self._insert(entry)
        self._write_off()
        if self.path.clean or held_all or Rule.GO_BACK_CLEAN not in self.rules:
            self.path = Path(epoch + 1, Mode.STREAM, run_id, fence)
        members, managers = self._registered()
        return self.path, members, managers

    def _worth_salvaging(self, entry: Entry) -> bool:
        if self.path.clean:
            return Rule.SALVAGE_ONLY_UNCLEAN not in self.rules
        last = entry.position.epoch == self.path.epoch - 1 or Rule.SALVAGE_LAST_EPOCH not in self.rules
        return last and Rule.SALVAGE_UNCLEAN in self.rules

    def registered(self, epoch: int) -> tuple[list[str], list[str]]:
        """For whom the grant of the present epoch is."""
        if not self.path.at(epoch, Mode.STREAM):
            raise Stale
        return self._registered()

    def unregister(self, name: str, epoch: int, through: Position) -> bool:
        """Forget a kicked process once all that it can have acked is flushed; False: not yet."""
        known = self.processes.get(name)
        if not self.path.at(epoch, Mode.STREAM) or known is None or not self._expired(known):
            return True
        if through.number >= 0 and self.flushed_through < through and Rule.UNREGISTER_FLUSHED in self.rules:
            return False
        del self.processes[name]
        return True

    # ----- helpers

    def _registered(self) -> tuple[list[str], list[str]]:
        return list(self.processes), list(self.managers)

    def _may_flush(self, fence: int, epoch: int) -> bool:
        if fence != self.fence:
            return False
        return self.path.at(epoch, Mode.STREAM) or Rule.FLUSH_CHECKS_PATH not in self.rules

    def _last(self) -> Position:
        return max((item.position for item in self.items.values()), default=NOTHING)

    def _insert(self, entry: Entry, *, once: bool = True) -> None:
        known = self.items.get(entry.item_id)
        if known is not None:
            if not once:
                self.broken.append(f"{entry.item_id} is stored twice")
            elif known.body != entry.body:
                self.dead_letters.append(entry)
            return
        if any(item.position == entry.position for item in self.items.values()):
            self.broken.append(f"position {tuple(entry.position)} is given out twice")
        self.items[entry.item_id] = Item(entry.position, entry.body)

    def _expired(self, known: Registration) -> bool:
        return self.schedule.now - known.heartbeat_at > HEARTBEAT_TICKS

    def _patient(self, manager: str, seen_at: int) -> bool:
        """Whether a missed heartbeat can't be due to Postgres having been away."""
        now = self.schedule.now
        if Rule.JUDGE_PATIENTLY not in self.rules:
            return True
        return now - self.managers[manager].since > HEARTBEAT_TICKS and now - seen_at <= JUDGEMENT_TICKS

    def _give_up_on(self, name: str, known: Registration) -> None:
        self._judge(name, known)
        del self.processes[name]
        if Rule.ABSENT_IS_MISSING in self.rules:
            missing = Missing(name, self.schedule.now)
            self.path = self.path._replace(missing=(*self.path.missing, missing))
            self.ever_missing.add(name)

    def _keep_aside(self, items: dict[str, Item]) -> None:
        """Complete reads were given without what the written-off bring back: it stays out of the order."""
        for item_id, item in items.items():
            if item_id not in self.items:
                self.dead_letters.append(Entry(item.position, item_id, item.body))

    def _judge(self, name: str, known: Registration) -> None:
        since = known.heartbeat_at
        away = sum(max(0, until - max(begin, since)) for begin, until in self.away_ticks)
        if self.schedule.now - since - away < HEARTBEAT_TICKS / 2:
            self.broken.append(f"FALSE ALARM: {name} was judged dead because Postgres was away")

    def _write_off(self) -> None:
        """Stop waiting for the missing; what they may have held is counted as suspected loss."""
        oldest = self.schedule.now - WRITE_OFF_TICKS
        self.written_off.update(m.name for m in self.path.missing if m.since < oldest)
        self.path = self.path._replace(missing=tuple(m for m in self.path.missing if m.since >= oldest))
