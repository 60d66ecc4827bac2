"""What goes wrong. A fault is a generator that breaks something, and mostly mends it a while later."""

from __future__ import annotations

from collections.abc import Callable

from tests.model.flusher import Flusher
from tests.model.postgres import HEARTBEAT_TICKS, WRITE_OFF_TICKS
from tests.model.process import Process
from tests.model.redis_server import RedisData, RedisServer
from tests.model.schedule import Host, Steps
from tests.model.world import World


class Faults:
    """All faults, each a method named for what it does."""

    def __init__(self, world: World, processes: list[Process], flushers: list[Flusher]) -> None:
        self.world = world
        self.processes = processes
        self.flushers = flushers
        self.pick = world.schedule.pick

    def _note(self, what: str) -> None:
        self.world.note(self.world.network, "****", what)

    # ----- Redis

    def crash_and_rewind(self) -> Steps:
        """Redis dies and comes back with a prefix of its append-only file."""
        data = self.world.redis.data.copy()
        yield self.pick(1, 120)
        yield from self._restart(data)

    def crash_keeping_all(self) -> Steps:
        """Redis dies and comes back with everything."""
        yield from self._restart(None)

    def crash_empty(self) -> Steps:
        """Redis dies and comes back empty."""
        yield from self._restart(RedisData())

    def _restart(self, data: RedisData | None) -> Steps:
        server = self.world.redis
        server.up = False
        self._note("Redis dies")
        yield self.pick(1, 300)
        if self.world.redis is server:
            self.world.replace_redis(server.data.copy() if data is None else data)
            self._note(f"Redis is back as {self.world.redis.run_id}")

    def flushall(self) -> Steps:
        """Redis is wiped while it runs."""
        self.world.wipe_redis(self.world.redis)
        self._note("FLUSHALL")
        yield None

    def stop_redis(self) -> Steps:
        """Redis stands still, then wakes up and goes on with what was sent to it."""
        server = self.world.redis
        server.stopped = True
        self._note("Redis stops")
        yield self.pick(20, 500)
        server.stopped = False
        self._note("Redis wakes up")

    def stop_redis_long(self) -> Steps:
        """Redis stands still until the missing could be written off."""
        server = self.world.redis
        server.stopped = True
        self._note("Redis stops")
        yield self.pick(WRITE_OFF_TICKS + HEARTBEAT_TICKS, 2 * WRITE_OFF_TICKS)
        server.stopped = False
        self._note("Redis wakes up")

    def promote_older(self) -> Steps:
        """An older copy becomes the primary; the old one serves those who are still connected to it."""
        data = self.world.redis.data.copy()
        yield self.pick(1, 120)
        old = self.world.redis
        self.world.replace_redis(data)
        self._note(f"an older copy is primary as {self.world.redis.run_id}")
        yield self.pick(1, 400)
        yield from self._demote(old)

    def fail_back(self) -> Steps:
        """An older copy becomes the primary, and much later the old one is the primary again."""
        old = self.world.redis
        self.world.replace_redis(old.data.copy())
        self._note(f"an older copy is primary as {self.world.redis.run_id}")
        yield self.pick(200, 1500)
        yield from self._demote(self.world.redis)
        self.world.redis = old
        self._note(f"server{old.run_id} is primary again")

    def _demote(self, old: RedisServer) -> Steps:
        old.up = False
        self.world.history.destroyed.update(entry.item_id for entry in old.data.stream)
        self._note(f"server{old.run_id} is gone")
        yield None

    # ----- hosts

    def _one(self, hosts: list[Process] | list[Flusher]) -> Host:
        alive = [host for host in hosts if not host.killed]
        return alive[self.pick(0, len(alive) - 1)]

    def kill_process(self) -> Steps:
        """An accepting process dies, if it is not the last one."""
        if sum(not process.killed for process in self.processes) > 1:
            yield from self._kill(self._one(self.processes))

    def kill_flusher(self) -> Steps:
        """A flusher dies, if it is not the last one."""
        if sum(not flusher.killed for flusher in self.flushers) > 1:
            yield from self._kill(self._one(self.flushers))

    def _kill(self, host: Host) -> Steps:
        host.killed = True
        self._note(f"{host.name} dies")
        yield None

    def pause_process(self) -> Steps:
        """A process stands still past its heartbeat, and wakes up."""
        yield from self._pause(self._one(self.processes), self.pick(HEARTBEAT_TICKS, 3 * HEARTBEAT_TICKS))

    def pause_process_long(self) -> Steps:
        """A process stands still until it was written off, and wakes up."""
        yield from self._pause(
            self._one(self.processes), self.pick(WRITE_OFF_TICKS + HEARTBEAT_TICKS, 2 * WRITE_OFF_TICKS)
        )

    def suspend_process(self) -> Steps:
        """The machine of a process is suspended, its clock included, and finds Postgres late after that."""
        process = self._one(self.processes)
        ticks = self.pick(HEARTBEAT_TICKS, 3 * HEARTBEAT_TICKS)
        process.suspended_ticks += ticks
        yield from self._pause(process, ticks)
        yield from self._cut(process, "without_postgres")

    def pause_flusher(self) -> Steps:
        """A flusher stands still past its lease, and wakes up."""
        yield from self._pause(self._one(self.flushers), self.pick(200, 1200))

    def _pause(self, host: Host, ticks: int) -> Steps:
        host.paused = True
        self._note(f"{host.name} stands still")
        yield ticks
        self.world.schedule.resume(host)
        self._note(f"{host.name} wakes up")

    def cut_process_from_redis(self) -> Steps:
        """One process can't reach Redis."""
        yield from self._cut(self._one(self.processes), "without_redis")

    def cut_process_from_postgres(self) -> Steps:
        """One process can't reach Postgres."""
        yield from self._cut(self._one(self.processes), "without_postgres")

    def cut_flusher_from_redis(self) -> Steps:
        """One flusher can't reach Redis."""
        yield from self._cut(self._one(self.flushers), "without_redis")

    def cut_flusher_from_postgres(self) -> Steps:
        """One flusher can't reach Postgres."""
        yield from self._cut(self._one(self.flushers), "without_postgres")

    def _cut(self, host: Host, link: str) -> Steps:
        setattr(host, link, True)
        self._note(f"{host.name} {link}")
        yield self.pick(20, 700)
        setattr(host, link, False)
        self._note(f"{host.name} no longer {link}")

    # ----- Postgres

    def postgres_away(self) -> Steps:
        """Postgres can't be reached by anybody."""
        if not self.world.postgres_up:
            return
        began = self.world.schedule.now
        self.world.postgres_up = False
        self._note("Postgres is away")
        yield self.pick(20, 800)
        self.world.postgres_up = True
        self.world.postgres.away_ticks.append((began, self.world.schedule.now))
        self._note("Postgres is back")

    # ----- all together

    def any(self) -> Steps:
        """One of all of the above."""
        names = [name for name in EVERY if name not in _NOT_ANY]
        yield from self.named(names[self.pick(0, len(names) - 1)])

    def named(self, name: str) -> Steps:
        """The fault of that name."""
        fault: Callable[[], Steps] = getattr(self, name)
        return fault()


_NOT_ANY = ("any", "suspend_process", "pause_process_long", "stop_redis_long")
EVERY = tuple(name for name in vars(Faults) if not name.startswith("_") and name != "named")
