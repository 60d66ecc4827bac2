"""Several processes that append, pop, delete and erase, and what they were told, held against what is there.

See `tests.support.changer_process` for what each does and writes down. The rules are those of the contract:
an erasure covers every position up to its receipt's, and nothing else; what was deleted or popped stays
away; an operation of unknown outcome may have happened or not, but as a whole.
"""

from __future__ import annotations

import asyncio
import json
import signal
from collections import Counter, defaultdict
from collections.abc import Collection, Iterator
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import asyncpg

from buffer import Buffer, Settings
from tests.support.changer_process import CONVERSATIONS, body_of
from tests.support.ledger import Seen, in_reads
from tests.support.polling import eventually
from tests.support.processes import Command, Commands

STOP_SECONDS = 20.0
START_SECONDS = 30.0
# A request that its caller gave up may still be on its way for so long.
LATE_SECONDS = 1.0

CONVERSATION_NAMES = [f"c{number}" for number in range(CONVERSATIONS)]


@dataclass(slots=True)
class Step:
    """One call of one client. Without an answer its outcome is unknown, and it may end at any time."""

    process: str
    began: float
    kind: str
    conversation: str
    ids: list[str]
    ended: float = float("inf")
    outcome: str = "unknown"
    detail: Any = None

    @property
    def happened(self) -> bool:
        """Certainly."""
        return self.outcome == "ok"

    @property
    def possible(self) -> bool:
        return self.outcome != "refused"


class Place(NamedTuple):
    """An item id and where it stands, or stood."""

    id: str
    position: int


class Changers:
    """The processes of a test and their histories."""

    def __init__(self, commands: Commands) -> None:
        self._commands = commands
        self._children: dict[str, Command] = {}

    def __getitem__(self, name: str) -> Command:
        return self._children[name]

    def start(self, name: str, settings: Settings) -> None:
        """Start a process."""
        self._children[name] = self._commands.start(
            settings, "-m", "tests.support.changer_process", name, f"{name}.jsonl"
        )

    async def at_work(self, *, more: int = 2, seconds: float = START_SECONDS) -> None:
        """Return once that many more erasures have succeeded, and all processes append."""
        before = self._counts()

        def enough() -> bool:
            now = self._counts()
            new = {key: n - before[key] for key, n in now.items()}
            erased = sum(n for (_, kind), n in new.items() if kind == "erase")
            return erased >= more and all(
                new.get((name, "append"), 0) >= 10
                for name, c in self._children.items()
                if c.exit_code is None
            )

        await eventually(enough, seconds=seconds)

    def _counts(self) -> Counter[tuple[str, str]]:
        return Counter((step.process, step.kind) for step in self.steps() if step.happened)

    async def stop(self) -> None:
        """SIGTERM, and wait until every client has its last answer."""
        for child in self._children.values():
            child.send(signal.SIGTERM)
        for name, child in self._children.items():
            code = await eventually(lambda child=child: child.exit_code is not None, seconds=STOP_SECONDS)
            assert code, name
            assert child.exit_code in {0, -signal.SIGKILL}, child.text[-2_000:]

    def steps(self) -> Iterator[Step]:
        """All calls so far."""
        for name, child in self._children.items():
            history: Path = child.log.parent / f"{name}.jsonl"
            if not history.exists():
                continue
            steps: dict[int, Step] = {}
            for line in history.read_bytes().splitlines(keepends=True):
                if not line.endswith(b"\n"):
                    continue
                what, number, at, *rest = json.loads(line)
                if what == "begin":
                    steps[number] = Step(name, at, *rest)
                else:
                    step = steps[number]
                    step.ended = at
                    step.outcome, step.detail = rest
            yield from steps.values()

    async def violations(
        self, buffer: Buffer, postgres: asyncpg.Connection, *, dead: Collection[str] = ()
    ) -> list[str]:
        """Everything that must not be, once all is flushed; ``dead``: processes whose acks may be lost."""
        found: list[str] = []
        by_conversation: dict[str, list[Step]] = defaultdict(list)
        for step in self.steps():
            by_conversation[step.conversation].append(step)
        stored = await _stored(postgres)
        shown = await in_reads(buffer, CONVERSATION_NAMES)
        for name, steps in by_conversation.items():
            rows = stored.rows.get(name, [])
            case = _Case(name, steps, stored.through.get(name, -1), rows, set(dead))
            case.check()
            found += case.found
            if [(s.id, s.position) for s in shown[name]] != [(s.id, s.position) for s in rows]:
                found.append(f"{name}: reads show something else than Postgres holds")
        return found + stored.leftovers

    def summary(self) -> str:
        """How many of each answer."""
        counts = Counter((step.kind, step.outcome) for step in self.steps())
        return ", ".join(f"{kind} {outcome} {n}" for (kind, outcome), n in sorted(counts.items()))

    def happened(self) -> Counter[str]:
        """How many of each kind succeeded."""
        return Counter(step.kind for step in self.steps() if step.happened)


@dataclass(slots=True)
class _Stored:
    rows: dict[str, list[Seen]]
    through: dict[str, int]
    leftovers: list[str]


async def _stored(postgres: asyncpg.Connection) -> _Stored:
    through = {
        r["conversation"]: r["through"]
        for r in await postgres.fetch("select conversation, through from buffer.tombstones")
    }
    rows: dict[str, list[Seen]] = defaultdict(list)
    for r in await postgres.fetch(
        "select conversation, item_id, position, data from buffer.items "
        "where data is not null order by conversation, position"
    ):
        rows[r["conversation"]].append(Seen(r["item_id"], r["position"], json.loads(r["data"])))
    leftovers = []
    for table in ("items", "removals", "dead_letters"):
        left = await postgres.fetch(
            f"select conversation, position from buffer.{table} t join buffer.tombstones using (tenant, "
            "conversation) where t.position <= through"
        )
        leftovers += [f"{r['conversation']}: {table} has erased position {r['position']}" for r in left]
    letters = await postgres.fetch("select conversation, item_id, reason from buffer.dead_letters")
    leftovers += [f"a dead letter: {dict(letter)}" for letter in letters]
    return _Stored(rows, through, leftovers)


@dataclass
class _Case:
    """One conversation: what its clients were told, and what is there."""

    name: str
    steps: list[Step]
    through: int
    rows: list[Seen]
    dead: set[str]
    found: list[str] = field(default_factory=list)

    def check(self) -> None:
        """Note everything that must not be."""
        self._index()
        self._check_erasures()
        self._check_rows()
        self._check_acks()
        self._check_batches()
        self._check_pops()
        self._check_order()
        for step in self.steps:
            if step.kind in {"read", "context"} and step.happened:
                self._check_read(step)

    def wrong(self, what: str) -> None:
        """One thing that must not be."""
        self.found.append(f"{self.name}: {what}")

    def _index(self) -> None:
        of_kind = {
            kind: [s for s in self.steps if s.kind == kind] for kind in ("append", "pop", "item", "erase")
        }
        self.appends, self.pops, self.items, self.erases = of_kind.values()
        self.live = {Place(row.id, row.position) for row in self.rows}
        self.live_ids = {row.id for row in self.rows}
        self.sent: dict[str, list[Step]] = defaultdict(list)
        for step in self.appends:
            for item_id in step.ids:
                if step.possible:
                    self.sent[item_id].append(step)
        # By id: those that may have removed it.
        self.removers: dict[str, list[Step]] = defaultdict(list)
        for step in self.items:
            if step.possible:
                self.removers[step.ids[0]].append(step)
        for step in self.pops:
            if step.happened and step.detail is not None:
                self.removers[step.detail[0]].append(step)
            elif step.outcome == "unknown":
                for item_id in step.detail or []:
                    self.removers[item_id].append(step)
        # A process that was killed within a pop left no word of which item it may have taken.
        self.blind_pops = [s for s in self.pops if s.outcome == "unknown" and not s.detail]

    def _places(self, step: Step) -> list[Place]:
        return [Place(*pair) for pair in zip(step.ids, step.detail, strict=True)] if step.happened else []

    def _check_erasures(self) -> None:
        told = [step.detail for step in self.erases if step.happened]
        if told and max(told) > self.through:
            self.wrong(f"erased through {max(told)}, and the tombstone says {self.through}")
        if (
            self.through >= 0
            and self.through not in told
            and not any(s.outcome == "unknown" for s in self.erases)
        ):
            self.wrong(f"nobody asked for the tombstone at {self.through}")

    def _check_rows(self) -> None:
        ids = Counter(row.id for row in self.rows)
        for row in self.rows:
            if row.position <= self.through:
                self.wrong(f"{row.id} at {row.position} was erased through {self.through}")
            if not self.sent[row.id]:
                self.wrong(f"{row.id} at {row.position} was never sent, or refused")
            if dict(row.body) != body_of(row.id) or ids[row.id] > 1:
                self.wrong(f"{row.id} at {row.position} is altered or there twice")
        for step in self.items:
            if step.happened and step.ids[0] in self.live_ids:
                self.wrong(f"{step.ids[0]} was deleted")
        for step in self.pops:
            if step.happened and step.detail is not None and Place(*step.detail) in self.live:
                self.wrong(f"{step.detail} was popped")

    def _check_acks(self) -> None:
        for step in self.appends:
            for place in self._places(step):
                if place in self.live:
                    continue
                if place.position <= self.through:
                    if not self._may_be_erased(place, step.began):
                        self.wrong(f"{place} is gone, and no erasure covers it")
                elif not self._may_be_removed(place.id) and step.process not in self.dead:
                    self.wrong(f"{place} was acked and is not there")

    def _may_be_erased(self, place: Place, began: float) -> bool:
        return any(
            step.detail >= place.position if step.happened else step.ended + LATE_SECONDS >= began
            for step in self.erases
            if step.possible
        )

    def _may_be_removed(self, item_id: str) -> bool:
        return bool(self.removers[item_id] or self.blind_pops)

    def _check_batches(self) -> None:
        """Whole or not at all, as far as nobody removed a part."""
        for step in self.appends:
            if len(step.ids) > 1 and not any(map(self._may_be_removed, step.ids)):
                there = [item_id in self.live_ids for item_id in step.ids]
                if any(there) and not all(there):
                    self.wrong(f"half of the batch {step.ids} is there")

    def _check_pops(self) -> None:
        taken: dict[Place, Step] = {}
        for step in self.pops:
            if not step.happened or step.detail is None:
                continue
            place = Place(*step.detail)
            if place in taken:
                self.wrong(f"{place} was popped twice")
            taken[place] = step
            for other in self.erases:
                if other.happened and other.ended < step.began and place.position <= other.detail:
                    self.wrong(f"{place} was popped after it was erased through {other.detail}")

    def _check_order(self) -> None:
        """What was acked before another was sent stands before it."""
        first: dict[Place, float] = {}
        for step in self.appends:
            for place in self._places(step):
                first[place] = min(step.ended, first.get(place, step.ended))
        latest: tuple[float, Place] | None = None  # of those so far, the one that was sent last
        for place, ended in sorted(first.items(), key=lambda item: item[0].position):
            if latest is not None and ended < latest[0]:
                self.wrong(f"{place} was acked before {latest[1]} was sent, and stands after it")
            sent = min(step.began for step in self.sent[place.id])
            if latest is None or sent > latest[0]:
                latest = sent, place

    def _check_read(self, read: Step) -> None:
        places, complete, limited = [Place(*p) for p in read.detail[0]], *read.detail[1:]
        if any(b.position <= a.position for a, b in pairwise(places)):
            self.wrong("a read is out of order")
        before = [step for step in self.steps if step.happened and step.ended < read.began]
        self._check_gone(read, places, before)
        if complete:
            oldest, seen = places[0].position if limited else 0, set(places)
            for step in before:
                if step.kind == "append" and step.process not in self.dead:
                    for place in self._places(step):
                        if place.position >= oldest and place not in seen:
                            self._check_missed(place, step, read)

    def _check_gone(self, read: Step, places: list[Place], before: list[Step]) -> None:
        """What was erased, deleted or popped before a read began is not in it."""
        ids = {place.id for place in places}
        for step in before:
            if step.kind == "erase" and places and places[0].position <= step.detail:
                self.wrong(f"a {read.kind} shows what was erased through {step.detail} before it began")
            if step.kind == "item" and step.ids[0] in ids:
                self.wrong(f"a {read.kind} shows {step.ids[0]}, which was deleted before it began")
            if step.kind == "pop" and step.detail is not None and Place(*step.detail) in places:
                self.wrong(f"a {read.kind} shows {step.detail}, which was popped before it began")

    def _check_missed(self, place: Place, append: Step, read: Step) -> None:
        """What was acked before a read began is in it, unless something may have removed it."""
        removers = [s for s in [*self.removers[place.id], *self.blind_pops] if s.began < read.ended]
        if not removers and not any(
            (s.detail >= place.position if s.happened else s.ended + LATE_SECONDS >= append.began)
            for s in self.erases
            if s.possible and s.began < read.ended
        ):
            self.wrong(f"a {read.kind} misses {place}, which was acked before it began")


async def settled(buffer: Buffer, *, seconds: float = 15.0) -> None:
    """Return once everything that was acked is in Postgres, by way of whichever path."""
    async with asyncio.timeout(seconds):
        await buffer.flush()
