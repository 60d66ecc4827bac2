"""An accepting process: append, read, and its side of the path protocol."""

from __future__ import annotations

from contextlib import suppress
from typing import Any

from tests.model.postgres import HEARTBEAT_TICKS, Mode, Path, Stale, Unclean
from tests.model.redis_server import (
    Conflict,
    Item,
    LastUnknown,
    Position,
    PreconditionFailed,
    RedisServer,
    Refused,
)
from tests.model.rules import Rule
from tests.model.schedule import Expected, Host, Steps
from tests.model.world import Lost, World

# How long a confirmed heartbeat permits acks; the rest of the time-out is for the ack's own way.
_PERMIT_TICKS = HEARTBEAT_TICKS * 6 // 10
# How fresh the managers' reports must be that Postgres is away for all, and how long they permit acks.
_REPORT_TICKS = HEARTBEAT_TICKS * 3 // 10
_ATTEMPTS = 6


class Unavailable(Expected):
    """503: try again, anywhere."""


class Process(Host):
    """What it knows; mode None means that it is not part of the service (joining)."""

    def __init__(self, world: World, name: str) -> None:
        super().__init__(name)
        self.world = world
        self.epoch = 1
        self.mode: Mode | None = Mode.STREAM
        self.run_id = world.redis.run_id
        self.permitted_until = _PERMIT_TICKS
        self.retained: dict[str, Item] = {}

    def clock(self) -> int:
        """A clock that is right in its rate, and stands still where the whole machine is suspended."""
        return self.world.schedule.now - self.suspended_ticks

    def _has(self, rule: Rule) -> bool:
        return rule in self.world.rules

    def _script(self, script: Any, *arguments: Any) -> Steps:
        """A script call in the epoch and incarnation of this moment."""
        yield from self.world.connect(self, self.run_id)
        return (yield from self.world.call_redis(self, script, *arguments))

    def _ask(self, transaction: Any, *arguments: Any) -> Steps:
        return (yield from self.world.call_postgres(self, transaction, *arguments))

    # ----- appends

    def append(self, item_id: str, body: str, if_match: Position | None) -> Steps:
        """Append once; the position.

        Raises:
            Conflict, PreconditionFailed: rejected for good.
            Unavailable: the outcome is unknown; to be repeated with the same id.
        """
        for _ in range(_ATTEMPTS):
            position = None
            try:
                if self.mode is Mode.STREAM:
                    position = yield from self._append_to_stream(item_id, body, if_match)
                elif self.mode is Mode.DIRECT:
                    position = yield from self._append_direct(item_id, body, if_match)
            except Refused:
                self._refused()
            except (Lost, LastUnknown, Stale, Unclean):
                pass
            if position is not None:
                return position
            yield self.world.schedule.pick(5, 25)
        raise Unavailable

    def _append_to_stream(self, item_id: str, body: str, if_match: Position | None) -> Steps:
        epoch = self.epoch
        if not self._permitted():
            return None
        if epoch > 1 and self._has(Rule.LOOK_UP_IDS):
            known = yield from self._ask(self.world.postgres.look_up, item_id)
            if known is not None:
                return self._same(known, body)
        try:
            position, duplicate, mark = yield from self._ask_redis(epoch, item_id, body, if_match)
        except (Conflict, PreconditionFailed):
            if not self._still_in(epoch):
                return None
            raise
        self._release(epoch, mark)
        if not self._still_in(epoch):
            return None
        if position.number > mark and (not duplicate or self._has(Rule.RETAIN_DUPLICATES)):
            self.retained[item_id] = Item(position, body)
        return position

    def _same(self, known: Item, body: str) -> Position:
        if known.body != body:
            raise Conflict
        return known.position

    def _ask_redis(self, epoch: int, item_id: str, body: str, if_match: Position | None) -> Steps:
        """The append script; where only Postgres knows the last position, under a lease for that."""
        append = (RedisServer.append, epoch, self.name, item_id, body, if_match)
        try:
            return (yield from self._script(*append, None))
        except LastUnknown:
            lease = yield from self._lease_for(if_match, epoch)
        if lease is None and not self._has(Rule.IDS_FIRST):
            raise PreconditionFailed
        try:
            return (yield from self._script(*append, lease))
        except LastUnknown:
            if lease is None:
                raise PreconditionFailed from None  # the script knows the id neither
            raise

    def _lease_for(self, if_match: Position | None, epoch: int) -> Steps:
        """A lease under which Postgres's last position was the expected one; None: it was another."""
        lease = self.world.schedule.pick(1, 1_000_000)
        if (yield from self._script(RedisServer.take_lease, epoch, self.name, lease)) is None:
            path, last = yield from self._ask(self.world.postgres.last_position)
            if not path.clean and self._has(Rule.IF_MATCH_CLEAN):
                raise Unclean
            if last != if_match:
                return None
        return lease

    def _append_direct(self, item_id: str, body: str, if_match: Position | None) -> Steps:
        number = None
        epoch = self.epoch
        if not self._has(Rule.DIRECT_NUMBERS):
            number = yield from self._ask(self.world.postgres.take_number)
        append = self.world.postgres.append_direct
        return (yield from self._ask(append, epoch, item_id, body, if_match, number))

    def _still_in(self, epoch: int) -> bool:
        """Whether a reply to a call of that epoch may count."""
        if self._has(Rule.LATE_REPLY) and not (self.epoch == epoch and self.mode is Mode.STREAM):
            return False
        return self._permitted()

    def _permitted(self) -> bool:
        return self.clock() <= self.permitted_until or not self._has(Rule.PERMIT)

    def _refused(self) -> None:
        if self.mode is Mode.STREAM:
            self.mode = None  # not a member, or no grant: the next look at the row tells

    # ----- reads

    def read(self) -> Steps:
        """The whole conversation, and whether it is complete.

        Raises:
            Unavailable: not now, or not here.
        """
        for _ in range(_ATTEMPTS):
            answer = None
            try:
                if self.mode is Mode.STREAM:
                    answer = yield from self._read_stream()
                elif self.mode is Mode.DIRECT:
                    answer = yield from self._read_direct()
            except Refused:
                self._refused()
            except Lost:
                pass
            if answer is not None:
                return answer
            yield self.world.schedule.pick(5, 25)
        raise Unavailable

    def _read_stream(self) -> Steps:
        epoch = self.epoch
        if self._has(Rule.TAIL_FIRST):
            tail, mark = yield from self._script(RedisServer.tail, epoch, self.name)
            path, through, rows = yield from self._ask(self.world.postgres.read)
        else:
            path, through, rows = yield from self._ask(self.world.postgres.read)
            tail, mark = yield from self._script(RedisServer.tail, epoch, self.name)
        self._release(epoch, mark)
        if self._has(Rule.READ_CHECKS_PATH) and not path.at(epoch, Mode.STREAM):
            return None
        if not self._still_in(epoch):
            return None
        stored = {row.item_id for row in rows}
        new = [entry for entry in tail if entry.position > through and entry.item_id not in stored]
        if self._has(Rule.RETAIN_SERVED):
            for entry in new:
                self.retained[entry.item_id] = Item(entry.position, entry.body)
        return rows + new, path.clean or not self._has(Rule.COMPLETE_IF_CLEAN)

    def _read_direct(self) -> Steps:
        epoch = self.epoch
        read = self.world.postgres.read
        path, _, rows = yield from self._ask(read)
        if not self._has(Rule.READ_SNAPSHOT):
            path, _, _ = yield from self._ask(read)
        if not path.at(epoch, Mode.DIRECT):
            return None
        return rows, path.clean or not self._has(Rule.COMPLETE_IF_CLEAN)

    # ----- the path

    def follow_path(self) -> Steps:
        """Heartbeat, and follow the path row, for ever."""
        while True:
            yield self.world.schedule.pick(5, 100)
            with suppress(Lost, Refused):
                yield from self._refresh()

    def follow_marks(self) -> Steps:
        """Release what is flushed, and renew the permit while Postgres is away for all, for ever."""
        while True:
            yield self.world.schedule.pick(5, 100)
            try:
                if self.mode is Mode.STREAM:
                    yield from self._look_at_redis()
            except Refused:
                self._refused()
            except Lost:
                pass

    def _look_at_redis(self) -> Steps:
        epoch, sent = self.epoch, self.clock()
        mark = yield from self._script(RedisServer.peek_mark, epoch, self.name)
        self._release(epoch, mark)
        if sent > self.permitted_until - _PERMIT_TICKS // 2:
            ago = yield from self._script(RedisServer.without_postgres_since, epoch, self.name)
            if ago <= _REPORT_TICKS:
                self.permitted_until = max(self.permitted_until, sent + _REPORT_TICKS)

    def _refresh(self) -> Steps:
        sent = self.clock()
        path, known = yield from self._ask(self.world.postgres.heartbeat, self.name)
        if path.mode is Mode.STREAM and path.epoch > self.epoch and not self._has(Rule.CONFIRM_BEFORE_STREAM):
            self._enter(path)
        if known is None:
            self.mode = None
            yield from self._rejoin(path)
            return
        self.permitted_until = max(self.permitted_until, sent + _PERMIT_TICKS)
        if path.mode is Mode.CLOSING:
            if known.confirmed < path.epoch:
                yield from self._confirm(path)
        elif path.mode is Mode.DIRECT:
            if known.confirmed >= path.epoch and not path.at(self.epoch, self.mode):
                self._enter(path)
        elif not path.at(self.epoch, self.mode):
            yield from self._join(path)

    def _confirm(self, path: Path) -> Steps:
        self.epoch, self.mode = path.epoch, Mode.CLOSING
        items, confirm = dict(self.retained), self.world.postgres.confirm
        if not self._has(Rule.SPILL_CONFIRMS):
            yield from self._ask(confirm, self.name, path.epoch, {})
            yield from self._ask(self.world.postgres.spill, items)
        else:
            yield from self._ask(confirm, self.name, path.epoch, items)

    def _enter(self, path: Path) -> None:
        self.epoch, self.mode, self.run_id = path.epoch, path.mode, path.run_id
        self.retained = {i: item for i, item in self.retained.items() if item.position.epoch >= path.epoch}

    def _join(self, path: Path) -> Steps:
        """Stream mode: become a member of the grant of the row's epoch, then enter it."""
        self.mode, self.run_id = None, path.run_id
        yield from self._script(RedisServer.join, path.epoch, self.name)
        self._enter(path)

    def _rejoin(self, path: Path) -> Steps:
        """Register again, with a spill of what older epochs left here; then join as the row says."""
        older = {i: item for i, item in self.retained.items() if item.position.epoch < path.epoch}
        if not self._has(Rule.REJOIN_SPILLS):
            older = {}
        if (yield from self._ask(self.world.postgres.rejoin, self.name, path, older)):
            self.retained = {i: item for i, item in self.retained.items() if i not in older}

    def _release(self, epoch: int, mark: int) -> None:
        for item_id, item in list(self.retained.items()):
            if item.position.number <= mark and (
                item.position.epoch == epoch or not self._has(Rule.MARK_EPOCH)
            ):
                del self.retained[item_id]
