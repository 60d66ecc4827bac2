"""Several accepting processes under load, and what their clients were told, held against what is there.

See `tests.support.writer_process` for what each does and writes down. Times are `time.monotonic`, which all
processes share: so "acked before the other was sent" can be said of two processes.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import signal
import time
from collections import Counter, defaultdict
from collections.abc import AsyncIterator, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager
from itertools import chain, pairwise
from operator import attrgetter
from pathlib import Path
from typing import NamedTuple

import asyncpg

from buffer import Buffer, Receipt, Settings
from tests.support.ledger import Ledger, in_postgres, in_reads
from tests.support.polling import eventually
from tests.support.processes import Command, Commands
from tests.support.writer_process import body_of

PACE = 1_000  # appends a second, all processes together
PACE_SECONDS = 3.0
START_SECONDS = 30.0
STOP_SECONDS = 30.0

Key = tuple[str, str]  # conversation and item id


class Ack(NamedTuple):
    """A receipt, when it came, and to which client of the process."""

    at: float
    conversation: str
    id: str
    position: int
    level: str
    path: str
    duplicate: bool
    client: int

    @property
    def key(self) -> Key:
        return self.conversation, self.id


class Failed(NamedTuple):
    """An attempt that ended without a receipt; ``kind`` is "unknown" or "refused"."""

    kind: str
    at: float
    conversation: str
    id: str
    seconds: float


class Read(NamedTuple):
    """A read that succeeded, or with ``kind`` "unread" one that was refused."""

    kind: str
    at: float
    conversation: str
    complete: bool
    seconds: float


class Writer:
    """One accepting process, and its history so far."""

    def __init__(self, name: str, child: Command) -> None:
        self.name = name
        self.child = child
        self.acks: list[Ack] = []
        self.failed: list[Failed] = []
        self.reads: list[Read] = []
        self.wrong: list[str] = []
        self.sent: dict[Key, float] = {}
        self._history = history_of(child, name)
        self._offset = 0

    def update(self) -> None:
        """Read what was written since the last time."""
        if not self._history.exists():
            return
        with self._history.open("rb") as file:
            file.seek(self._offset)
            new = file.read()
        whole = new[: new.rfind(b"\n") + 1]
        self._offset += len(whole)
        for line in whole.splitlines():
            self._take(*json.loads(line))

    def _take(self, kind: str, at: float, *values: object) -> None:
        if kind == "ack":
            self.acks.append(Ack(at, *values))
        elif kind == "sent":
            self.sent.setdefault((str(values[0]), str(values[1])), at)
        elif kind in {"unknown", "refused"}:
            self.failed.append(Failed(kind, at, *values))
        elif kind in {"read", "unread"}:
            self.reads.append(Read(kind, at, *values))
        else:
            self.wrong.append(f"{self.name}: {values}")

    def acks_since(self, at: float, path: str | None = None) -> list[Ack]:
        """New items that were acked after a moment, by one path or either."""
        self.update()
        return [a for a in self.acks if a.at > at and not a.duplicate and path in {None, a.path}]


def history_of(child: Command, name: str) -> Path:
    """Where a child writes its history."""
    return child.log.parent / f"{name}.jsonl"


class Writers:
    """All accepting processes of a test; see `running`."""

    def __init__(self, commands: Commands) -> None:
        self._commands = commands
        self.by_name: dict[str, Writer] = {}

    def __getitem__(self, name: str) -> Writer:
        return self.by_name[name]

    def __iter__(self) -> Iterator[Writer]:
        return iter(self.by_name.values())

    def start(self, name: str, settings: Settings) -> None:
        """Start a process with settings of its own."""
        child = self._commands.start(settings, "-m", "tests.support.writer_process", name, f"{name}.jsonl")
        self.by_name[name] = Writer(name, child)

    def update(self) -> None:
        """Read all histories."""
        for writer in self:
            writer.update()

    async def at_pace(self, *, start_seconds: float = START_SECONDS) -> None:
        """Return once all processes are at work, and together at `PACE`; a slow machine gives what it can."""

        def recent() -> list[int]:
            self.update()
            for writer in self:
                assert writer.child.exit_code is None, writer.child.text
            second = time.monotonic() - 1
            return [sum(ack.at > second for ack in writer.acks[-5_000:]) for writer in self]

        await eventually(lambda: all(recent()), seconds=start_seconds)
        with contextlib.suppress(AssertionError):
            await eventually(lambda: sum(recent()) >= PACE, seconds=PACE_SECONDS, every_seconds=0.1)
        recent()  # a process that has ended is no matter of pace

    async def acking(
        self, path: str, names: Collection[str] = (), *, since: float | None = None, seconds: float = 15.0
    ) -> float:
        """Return once each of these processes (all) got a receipt of a new item by that path after ``since``.

        ``since`` is now by default. The moment at which the last of them got its first one.
        """
        after = time.monotonic() if since is None else since

        def first_acks() -> list[float]:
            chosen = [writer for writer in self if not names or writer.name in names]
            found = [writer.acks_since(after, path) for writer in chosen]
            return [acks[0].at for acks in found] if all(found) else []

        return max(await eventually(first_acks, seconds=seconds))

    async def stop(self) -> None:
        """Let every client settle its last append, and every process leave in good order."""
        alive = [writer for writer in self if writer.child.exit_code is None]
        for writer in alive:
            writer.child.send(signal.SIGTERM)
        await eventually(
            lambda: all(writer.child.exit_code is not None for writer in alive), seconds=STOP_SECONDS
        )
        for writer in alive:
            assert writer.child.exit_code == 0, writer.child.text
        self.update()

    # --- what they were told

    def acks(self, *, since: float = 0.0, until: float = float("inf")) -> list[Ack]:
        """Receipts of a stretch of time, over all processes, in the order of time."""
        self.update()
        found = (ack for writer in self for ack in writer.acks if since < ack.at <= until)
        return sorted(found, key=attrgetter("at"))

    def reads(self, *, since: float = 0.0, until: float = float("inf")) -> list[Read]:
        """Reads that ended in a stretch of time."""
        self.update()
        return [read for writer in self for read in writer.reads if since < read.at <= until]

    def failed(self, *, since: float = 0.0, until: float = float("inf")) -> list[Failed]:
        """Attempts without a receipt, begun and ended in a stretch of time."""
        self.update()
        attempts = chain.from_iterable(writer.failed for writer in self)
        return [attempt for attempt in attempts if since < attempt.at - attempt.seconds < attempt.at <= until]

    def longest_silence(self, since: float, until: float) -> float:
        """The longest time without any receipt, over all processes."""
        times = [since, *(ack.at for ack in self.acks(since=since, until=until)), until]
        return max(b - a for a, b in pairwise(times))

    def summary(self) -> str:
        """How many of each answer."""
        self.update()
        paths = Counter(f"{a.path}{' again' if a.duplicate else ''}" for writer in self for a in writer.acks)
        failed = Counter(attempt.kind for writer in self for attempt in writer.failed)
        reads = Counter(f"{r.kind}{'' if r.complete else ' incomplete'}" for w in self for r in w.reads)
        return f"acks {dict(paths)}, attempts {dict(failed)}, reads {dict(reads)}"

    def ledger(self, *, before: float = float("inf"), dead: Collection[str] = ()) -> Ledger:
        """What was acked before a moment; everything else that was sent may be there or not.

        Of those who are ``dead`` nothing needs to be there.
        """
        ledger = Ledger()
        for conversation, item_id in chain.from_iterable(writer.sent for writer in self):
            ledger.unknown(conversation, item_id, body_of(item_id))
        for writer in self:
            for ack in writer.acks:
                if ack.at <= before and writer.name not in dead:
                    receipt = Receipt(ack.id, ack.position, ack.level, ack.path)
                    client = f"{writer.name}/{ack.client}"
                    ledger.ack(ack.conversation, receipt, body_of(ack.id), writer=client)
        return ledger

    # --- whether it is true

    async def violations(
        self, buffer: Buffer, postgres: asyncpg.Connection, *, dead: Collection[str] = ()
    ) -> list[str]:
        """Everything that must not be, once all is flushed; ``dead``: whose acks may be lost."""
        self.update()
        ledger = self.ledger(dead=dead)
        found = [what for writer in self for what in writer.wrong]
        found += untrue(chain.from_iterable(w.acks for w in self))
        found += inversions([w for w in self if w.name not in dead], self.first_sent())
        for where, contents in (
            ("Postgres", await in_postgres(postgres)),
            ("reads", await in_reads(buffer, ledger.conversations)),
        ):
            faults = ledger.faults(contents)
            found += [f"{where}: {faults!r}"] if faults else []
        return found

    async def unread(self, buffer: Buffer) -> list[str]:
        """What is wrong with reads through another process, at this very moment, while all go on."""
        self.update()
        began = time.monotonic()
        names = list({conversation for writer in self for conversation, _ in writer.sent})
        incomplete: set[str] = set()
        contents = await in_reads(buffer, names, incomplete=incomplete)
        self.update()  # what was begun meanwhile may be seen already
        faults = self.ledger(before=began).faults(contents)
        return ([repr(faults)] if faults else []) + [f"{name} is not complete" for name in incomplete]

    async def missing(self, name: str, postgres: asyncpg.Connection) -> dict[Key, Ack]:
        """What a process acked, and Postgres does not have."""
        self.update()
        contents = await in_postgres(postgres)
        there = {(conversation, item.id) for conversation, items in contents.items() for item in items}
        return {ack.key: ack for ack in self[name].acks if ack.key not in there}

    def first_sent(self) -> Mapping[Key, float]:
        """When each item was sent for the first time, by whichever process."""
        first: dict[Key, float] = {}
        for writer in self:
            for key, at in writer.sent.items():
                first[key] = min(at, first.get(key, at))
        return first


def untrue(acks: Iterable[Ack]) -> list[str]:
    """Receipts that claim what cannot be: by the direct path items are stored, by the stream buffered."""
    levels = {"direct": "stored", "stream": "buffered"}
    return [f"a receipt that cannot be: {ack}" for ack in acks if levels[ack.path] != ack.level]


def inversions(writers: Iterable[Writer], sent: Mapping[Key, float]) -> list[str]:
    """Items that stand before others which were acked before they were sent, whoever sent them."""
    acked: dict[str, dict[str, Ack]] = defaultdict(dict)
    for writer in writers:
        for ack in writer.acks:
            before = acked[ack.conversation].setdefault(ack.id, ack)
            if ack.at < before.at:
                acked[ack.conversation][ack.id] = ack
    found = []
    for acks in acked.values():
        latest: Ack | None = None  # of those so far, the one that was sent last
        for ack in sorted(acks.values(), key=attrgetter("position")):
            if latest is not None and ack.at < sent[latest.key]:
                found.append(f"out of order: {ack} was acked before {latest} was sent")
            if latest is None or sent[ack.key] > sent[latest.key]:
                latest = ack
    return found


@asynccontextmanager
async def running(
    commands: Commands,
    settings: Settings,
    writers: Sequence[str] | Mapping[str, Settings] = ("one", "two", "three"),
    *,
    flushers: int = 2,
) -> AsyncIterator[tuple[Writers, Buffer]]:
    """Flushers and accepting processes at work, at pace, and a `Buffer` beside them.

    ``writers``: their names; or with settings of their own, where they differ.
    """
    for _ in range(flushers):
        commands.flusher(settings)
    them = Writers(commands)
    for name in writers:
        them.start(name, writers[name] if isinstance(writers, Mapping) else settings)
    async with Buffer.connect(settings) as buffer:
        await them.at_pace()
        yield them, buffer


async def settled(buffer: Buffer, *, seconds: float = 15.0) -> None:
    """Return once everything that was acked is in Postgres, by way of whichever path."""
    async with asyncio.timeout(seconds):
        await buffer.flush()
