"""Runs schedules: by seed, under a profile, with or without a rule."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Iterable
from typing import NamedTuple

from tests.model.check import violations
from tests.model.clients import Clients
from tests.model.faults import Faults
from tests.model.flusher import Flusher
from tests.model.postgres import WRITE_OFF_TICKS, Mode, Registration
from tests.model.process import Process, Unavailable
from tests.model.redis_server import NEVER
from tests.model.rules import ALL, Rule
from tests.model.schedule import Steps, Task, Wait
from tests.model.world import World

_LONGEST_TICKS = 16_000
_QUIET_TICKS = WRITE_OFF_TICKS + 6_000


class Profile(NamedTuple):
    """What happens in a schedule; each fault begins at a random moment after the one before."""

    faults: tuple[str, ...] = ()
    writers: int = 2
    items: int = 4
    readers: int = 2
    rival: bool = False
    if_match: bool = False
    loss: float = 0.02
    flush_ticks: int = 60
    attempts: int = 8
    pace: int = 100
    gap: int = 200


PROFILES = {
    "quiet": Profile(loss=0),
    "lossy": Profile(loss=0.1),
    "rewind": Profile(("crash_and_rewind",)),
    "restart": Profile(("crash_keeping_all",)),
    "empty": Profile(("crash_empty",)),
    "flushall": Profile(("flushall",)),
    "stop": Profile(("stop_redis",)),
    "promote": Profile(("promote_older",)),
    "kill": Profile(("kill_process",)),
    "pause": Profile(("pause_process",)),
    "cut": Profile(("cut_process_from_redis",)),
    "alone": Profile(("cut_process_from_postgres",)),
    "flusher": Profile(("kill_flusher", "pause_flusher")),
    "postgres": Profile(("postgres_away",)),
    "two": Profile(("any", "any")),
    "two-lossy": Profile(("any", "any"), loss=0.08),
    "two-rival": Profile(("any", "any"), rival=True),
    "two-if-match": Profile(("any", "any"), if_match=True),
    "slow-flush": Profile(
        ("pause_process", "flushall"), items=6, readers=1, flush_ticks=3000, pace=200, gap=1000
    ),
    "suspend": Profile(("suspend_process", "flushall"), items=8, flush_ticks=200, pace=300, gap=1400),
    "fail-back": Profile(("fail_back", "pause_process"), items=8, attempts=1, loss=0.15, pace=150, gap=1000),
    "blind": Profile(
        ("pause_process", "flushall"), items=6, if_match=True, flush_ticks=600, pace=200, gap=600
    ),
    "stale-flush": Profile(("pause_flusher", "flushall"), attempts=1, items=8, flush_ticks=20, loss=0.1),
    "write-off": Profile(("pause_process_long", "flushall"), items=8, flush_ticks=600, pace=600),
    "long-stop": Profile(("stop_redis_long", "kill_process"), items=6, pace=300),
    "outage": Profile(("postgres_away",), items=8, pace=200, loss=0),
    "twice": Profile(("flushall", "flushall"), items=8, loss=0.2, gap=900, flush_ticks=300),
    "stop-alone": Profile(("cut_process_from_postgres", "stop_redis"), items=6),
    "three": Profile(("any", "any", "any"), items=6, readers=3),
}


class Outcome(NamedTuple):
    """How a schedule ended."""

    violations: list[str]
    world: World


def run(seed: int, profile: Profile, rules: frozenset[Rule] = ALL, *, tracing: bool = False) -> Outcome:
    """One schedule; the same arguments give the same one."""
    world = World(seed, rules, tracing=tracing)
    world.loss, world.flush_ticks = profile.loss, profile.flush_ticks
    processes = [Process(world, name) for name in ("P1", "P2", "P3")]
    flushers = [Flusher(world, name) for name in ("F1", "F2")]
    for process in processes:
        world.postgres.processes[process.name] = Registration(0, 1)
        world.redis.data.members.add(process.name)
        world.schedule.spawn(process, process.follow_path())
        world.schedule.spawn(process, process.follow_marks())
    for flusher in flushers:
        world.redis.data.managers[flusher.name] = NEVER
        world.schedule.spawn(flusher, flusher.run())
        world.schedule.spawn(flusher, flusher.manager.run())
    busy = _busy(world, Clients(world, processes), Faults(world, processes, flushers), profile)
    while not all(task.done for task in busy) and world.schedule.now < _LONGEST_TICKS:
        world.schedule.step()
    _heal(world, [*processes, *flushers])
    found = _settle_down(world, processes)
    return Outcome(found + violations(world), world)


def _busy(world: World, clients: Clients, faults: Faults, profile: Profile) -> list[Task]:
    """Start what ends by itself."""
    scripts: list[Steps] = []
    how = {"attempts": profile.attempts, "pace": profile.pace}
    for n in range(profile.writers):
        ids = [f"{'abc'[n]}{i}" for i in range(profile.items)]
        scripts.append(clients.writer(ids, "body", if_match=profile.if_match and n == 0, **how))
    if profile.rival:
        scripts.append(clients.writer([f"a{i}" for i in range(profile.items)], "other", **how))
    scripts += [clients.reader(2 * profile.items, profile.pace) for _ in range(profile.readers)]
    tasks = [world.schedule.spawn(world.clients, steps) for steps in scripts]
    return [*tasks, world.schedule.spawn(world.network, _faults_in_turn(faults, profile))]


def _faults_in_turn(faults: Faults, profile: Profile) -> Steps:
    begun = []
    for name in profile.faults:
        yield faults.pick(1, profile.gap)
        begun.append(faults.world.schedule.spawn(faults.world.network, faults.named(name)))
    for fault in begun:
        yield Wait(fault, _LONGEST_TICKS)


def _heal(world: World, hosts: Iterable[Process | Flusher]) -> None:
    """Mend everything that can be mended; the dead stay dead."""
    world.note(world.network, "**** all is mended")
    world.loss, world.flush_ticks = 0, 60
    world.schedule.smooth = True
    world.postgres_up = True
    world.redis.stopped = False
    if not world.redis.up:
        world.replace_redis(world.redis.data.copy())
    for server in world.servers:
        server.up = server is world.redis
    for host in hosts:
        host.without_redis = host.without_postgres = False
        if host.paused:
            world.schedule.resume(host)


def _settle_down(world: World, processes: list[Process]) -> list[str]:
    """Run until nothing is left to do, then read everywhere; what does not come to rest is a violation."""
    alive = [process for process in processes if not process.killed]
    if not _comes_to_rest(world, alive):
        return [f"STUCK: {world.postgres.path}, {[(p.name, p.mode, p.epoch) for p in alive]}"]
    readers = [world.schedule.spawn(world.clients, _last_read(world, process)) for process in alive]
    while not all(task.done for task in readers):
        world.schedule.step()
    _comes_to_rest(world, alive)  # what a process still had to do for a client that has left
    failed = [process.name for process, task in zip(alive, readers, strict=True) if task.error]
    return [f"STUCK: {name} has no complete read" for name in failed]


def _comes_to_rest(world: World, alive: list[Process]) -> bool:
    until = world.schedule.now + _QUIET_TICKS
    while not _at_rest(world, alive):
        if world.schedule.now > until or not world.schedule.step():
            return False
    return True


def _last_read(world: World, process: Process) -> Steps:
    reader = Clients(world, [process])
    for _ in range(9):
        try:
            if (yield from reader.read_once())[1]:
                return
        except Unavailable:
            yield 20
    raise Unavailable


def _at_rest(world: World, alive: list[Process]) -> bool:
    path = world.postgres.path
    if path.mode is not Mode.STREAM or not path.clean or world.redis.data.epoch != path.epoch:
        return False
    if world.redis.data.stream or set(world.postgres.processes) != {process.name for process in alive}:
        return False
    return all(p.mode is Mode.STREAM and p.epoch == path.epoch and not p.retained for p in alive)


def search(profile: Profile, seeds: Iterable[int], rules: frozenset[Rule]) -> tuple[int, list[str]] | None:
    """The first seed that breaks an invariant, and what it breaks."""
    for seed in seeds:
        found = run(seed, profile, rules).violations
        if found:
            return seed, found
    return None


def main(arguments: list[str] | None = None) -> int:
    """`python -m tests.model`: explore, or replay one seed."""
    parser = argparse.ArgumentParser(prog="python -m tests.model", description=main.__doc__)
    parser.add_argument("--seeds", type=int, default=4000, help="schedules altogether")
    parser.add_argument("--base", type=int, default=0, help="the first seed")
    parser.add_argument("--seed", type=int, help="only this one")
    parser.add_argument("--profile", choices=list(PROFILES), help="only this one")
    parser.add_argument("--without", action="append", default=[], choices=[r.name for r in Rule])
    parser.add_argument("--trace", action="store_true", help="print the schedule")
    options = parser.parse_args(arguments)
    rules = ALL - {Rule[name] for name in options.without}
    names = [options.profile] if options.profile else list(PROFILES)
    each = max(1, options.seeds // len(names))
    seeds = range(options.base, options.base + each) if options.seed is None else [options.seed]
    failed = False
    for name in names:
        began = time.perf_counter()
        hit = _first(name, seeds, rules, trace=options.trace)
        failed = failed or hit
        sys.stdout.write(f"{name:14} {len(seeds)} seeds, {time.perf_counter() - began:.1f} s\n")
    return 1 if failed else 0


def _first(name: str, seeds: Iterable[int], rules: frozenset[Rule], *, trace: bool) -> bool:
    hit = search(PROFILES[name], seeds, rules)
    if hit is None:
        return False
    seed, found = hit
    sys.stdout.write(f"{name}: seed {seed}: {'; '.join(found)}\n")
    if trace:
        world = run(seed, PROFILES[name], rules, tracing=True).world
        sys.stdout.write("\n".join([*(world.trace or []), *found, ""]))
    return True
