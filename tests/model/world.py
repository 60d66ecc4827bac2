"""The two stores, the ways to them, and what really happened (the checker's ground truth)."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from tests.model.postgres import Postgres
from tests.model.redis_server import Entry, Position, RedisData, RedisServer
from tests.model.rules import Rule
from tests.model.schedule import Expected, Host, Schedule, Steps

CALL_TIMEOUT_TICKS = 60
_SLOW_TICKS = 500
_LATE_TICKS = 200


class Lost(Expected):
    """No answer came: it may have been done, may be done later, or never."""


class WrongServer(Lost):
    """The server that answers is not the one that the path row names."""


class Ack(NamedTuple):
    """A client got a receipt."""

    at: int
    item_id: str
    body: str
    position: Position
    host: Host
    if_match: Position | None


class Read(NamedTuple):
    """A client got a conversation."""

    began: int
    ended: int
    items: list[Entry]
    complete: bool
    host: Host


@dataclass
class History:
    """What clients saw, and what faults destroyed."""

    began: dict[str, int] = field(default_factory=dict)
    acks: list[Ack] = field(default_factory=list)
    rejected: list[str] = field(default_factory=list)
    reads: list[Read] = field(default_factory=list)
    destroyed: set[str] = field(default_factory=set)
    written_off: set[str] = field(default_factory=set)


class World:
    """Everything that one schedule is about."""

    def __init__(self, seed: int, rules: frozenset[Rule], *, tracing: bool = False) -> None:
        self.schedule = Schedule(seed)
        self.rules = rules
        self.history = History()
        self.trace: list[str] | None = [] if tracing else None
        self.clients = Host("clients")
        self.network = Host("network")
        self.loss = 0.0
        self.flush_ticks = 60
        self._run_ids = 1
        self.redis = RedisServer(self.schedule, 1, RedisData(epoch=1), rules)
        self.servers = [self.redis]
        self.postgres = Postgres(self.schedule, rules, self.redis.run_id)
        self.postgres_up = True

    def note(self, host: Host, *what: Any) -> None:
        """Add a line to the trace."""
        if self.trace is not None:
            self.trace.append(f"{self.schedule.now:5} {host.name:8} {' '.join(map(_short, what))}")

    # ----- calls

    def call_redis(self, host: Host, script: Callable[..., Any], *arguments: Any) -> Steps:
        """Run a script on the server that the host is connected to.

        Raises:
            Lost: no answer came.
            Refused, Conflict, PreconditionFailed, LastUnknown: the script's own answers.
        """
        server: RedisServer = host.server
        yield None
        if host.without_redis or not server.up:
            host.server = None
            raise Lost
        fate = self._fate()
        if server.stopped or fate == "late":
            self.schedule.spawn(self.network, self._deliver_late(server, script, arguments))
            yield CALL_TIMEOUT_TICKS
            host.server = None
            raise Lost
        answer, error = None, None
        if fate != "request":
            try:
                answer = script(server, *arguments)
            except Expected as refusal:
                error = refusal
            self.note(host, script.__name__, *arguments, "->", error or answer)
        yield self.schedule.pick(1, _SLOW_TICKS) if fate == "slow" else None
        if fate in ("reply", "request") or host.without_redis:
            host.server = None
            raise Lost
        if error is not None:
            raise error
        return answer

    def call_postgres(
        self, host: Host, transaction: Callable[..., Any], *arguments: Any, **flags: bool
    ) -> Steps:
        """Run a transaction.

        Raises:
            Lost: no answer came.
            Expected: the transaction's own answers.
        """
        yield None
        if host.without_postgres or not self.postgres_up:
            raise Lost
        fate = self._fate()
        if fate == "late":
            self.schedule.spawn(self.network, self._commit_late(transaction, arguments, flags))
            yield CALL_TIMEOUT_TICKS
            raise Lost
        answer, error = None, None
        if fate != "request":
            try:
                answer = transaction(*arguments, **flags)
            except Expected as refusal:
                error = refusal
            self.note(host, transaction.__name__, *arguments, "->", error or answer)
        yield self.schedule.pick(1, _SLOW_TICKS) if fate == "slow" else None
        if fate in ("reply", "request") or host.without_postgres or not self.postgres_up:
            raise Lost
        if error is not None:
            raise error
        return answer

    def connect(self, host: Host, run_id: int | None, rule: Rule = Rule.RUN_ID) -> Steps:
        """Be connected to Redis, and to the named incarnation of it.

        Raises:
            Lost: it can't be reached.
            WrongServer: another one is there.
        """
        for_any = run_id is None or rule not in self.rules
        if host.server is not None and (for_any or host.server.run_id == run_id):
            return
        host.server = None
        yield None
        server = self.redis
        if host.without_redis or not server.up or server.stopped:
            raise Lost
        if not for_any and server.run_id != run_id:
            raise WrongServer
        host.server = server

    def _fate(self) -> str:
        chance = self.schedule.random()
        if chance >= self.loss:
            return ""
        share = chance / self.loss
        return "reply" if share < 0.4 else "late" if share < 0.7 else "slow" if share < 0.9 else "request"

    def _deliver_late(
        self, server: RedisServer, script: Callable[..., Any], arguments: tuple[Any, ...]
    ) -> Steps:
        yield self.schedule.pick(1, _LATE_TICKS)
        while server.stopped:
            yield 5
        if server.up:
            with suppress(Expected):
                script(server, *arguments)
            self.note(self.network, "late", script.__name__, *arguments)

    def _commit_late(
        self, transaction: Callable[..., Any], arguments: tuple[Any, ...], flags: dict[str, bool]
    ) -> Steps:
        yield self.schedule.pick(1, _LATE_TICKS)
        if self.postgres_up:
            with suppress(Expected):
                transaction(*arguments, **flags)
            self.note(self.network, "late", transaction.__name__, *arguments)

    # ----- faults of Redis

    def replace_redis(self, data: RedisData) -> None:
        """Another server is the primary from now on, with this data."""
        self._run_ids += 1
        kept = {entry.item_id for entry in data.stream}
        self.history.destroyed.update(e.item_id for e in self.redis.data.stream if e.item_id not in kept)
        self.redis = RedisServer(self.schedule, self._run_ids, data, self.rules)
        self.servers.append(self.redis)

    def wipe_redis(self, server: RedisServer) -> None:
        """All its data is gone."""
        self.history.destroyed.update(entry.item_id for entry in server.data.stream)
        server.data = RedisData()


def _short(value: Any) -> str:
    if isinstance(value, Position):
        return f"{value.epoch}.{value.number}"
    if isinstance(value, RedisServer):
        return f"server{value.run_id}"
    if isinstance(value, Expected):
        return type(value).__name__
    return str(value)
