"""The demo's run: writers, a kill, a restart, and a count. Every number is computed from what happened.

The writers keep a ledger of what was acked to them. At the end the ledger is compared with the rows in
Postgres, read with plain SQL: nothing of the path that is being judged takes part in the judgement.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any

import anyio

from buffer.app.buffer import Buffer
from buffer.app.runtime import Runtime, migrate_database
from buffer.demo.dialogues import dialogue
from buffer.embedded import EmbeddedServers
from buffer.errors import OutcomeUnknown, Unavailable
from buffer.settings import Settings
from buffer.store.audit import conversation_rows, forget_item

_WRITERS = 24
_APPENDS_PER_SECOND = 2_000
_TENANT = "demo"


@dataclass(slots=True)
class DemoReport:
    """What happened. Times in milliseconds or seconds, as named."""

    seconds: float
    appended: int = 0
    acked: int = 0
    retried: int = 0
    in_postgres: int = 0
    missing: int = 0
    duplicated: int = 0
    out_of_order: int = 0
    append_p50_ms: float = 0.0
    append_p99_ms: float = 0.0
    without_redis_seconds: float = 0.0
    longest_append_seconds: float = 0.0
    appended_without_redis: int = 0
    flush_lag_max_seconds: float = 0.0

    @property
    def ok(self) -> bool:
        """Whether everything that was acked is in Postgres, once and in order."""
        return self.acked > 0 and not (self.missing or self.duplicated or self.out_of_order)

    def to_dict(self) -> dict[str, Any]:
        """For ``--json``."""
        return {**asdict(self), "ok": self.ok}


@dataclass(slots=True)
class _Ledger:
    """What the writers know: the acked ids of each conversation, in the order of their acks."""

    acked: dict[str, list[tuple[str, int]]] = field(default_factory=dict)
    seconds: list[float] = field(default_factory=list)
    appended: int = 0
    retried: int = 0
    direct: int = 0


async def run_demo(
    seconds: float = 6.0, *, say: Callable[[str], None] = lambda _: None, plant: str | None = None
) -> DemoReport:
    """Run it. ``plant="lost"`` removes one acked row before the count, which the count must notice."""
    report = DemoReport(seconds)
    say("starting Redis and Postgres, embedded")
    async with EmbeddedServers.start() as servers:
        settings = Settings.load(
            redis_url=servers.redis.url, postgres_url=servers.postgres.url, append_timeout_seconds=10.0
        )
        await migrate_database(settings)
        async with Buffer.connect(settings, flusher=True) as buffer:
            ledger = _Ledger()
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(_watch_lag, buffer.runtime, report)
                await _write_while_redis_dies(buffer, servers, ledger, report, say)
                await buffer.flush()
                tasks.cancel_scope.cancel()
            if plant == "lost":
                conversation, acked = next(iter(ledger.acked.items()))
                await forget_item(buffer.runtime.database, _TENANT, conversation, acked[-1][0])
            say("comparing the writers' ledger with the rows in Postgres")
            await _count(buffer.runtime, ledger, report)
    return report


async def _write_while_redis_dies(
    buffer: Buffer, servers: EmbeddedServers, ledger: _Ledger, report: DemoReport, say: Callable[[str], None]
) -> None:
    until = time.monotonic() + report.seconds
    async with anyio.create_task_group() as writers:
        for number in range(_WRITERS):
            writers.start_soon(_write, buffer, number, until, ledger)
        say(f"{_WRITERS} writers append {_APPENDS_PER_SECOND:,} items a second for {report.seconds:g} s")
        await anyio.sleep(report.seconds * 0.4)
        pid = servers.redis.pid
        await servers.redis.kill()
        killed = time.monotonic()
        servers.redis.wipe()
        acked = len(ledger.seconds)
        say(f"Redis (pid {pid}) is dead: SIGKILL, and its data deleted, with {acked:,} items acked so far")
        await anyio.sleep(report.seconds * 0.3)
        await servers.redis.restart()
        report.without_redis_seconds = round(time.monotonic() - killed, 3)
        say(f"Redis is back after {report.without_redis_seconds:.1f} s, empty")


async def _write(buffer: Buffer, number: int, until: float, ledger: _Ledger) -> None:
    """Append one dialogue at a steady pace; an item that fails is repeated under the same id."""
    conversation = buffer.conversation(f"ticket-{number}", tenant=_TENANT, user=f"user-{number % 7}")
    acked = ledger.acked.setdefault(conversation.id, [])
    pause = _WRITERS / _APPENDS_PER_SECOND
    due = time.monotonic()
    for count, item in enumerate(dialogue(number)):
        if time.monotonic() >= until:
            return
        due += pause
        item_id = f"turn-{count}"
        ledger.appended += 1
        began = time.perf_counter()
        while True:
            try:
                receipt = await conversation.append(item, id=item_id)
                break
            except (Unavailable, OutcomeUnknown) as error:
                ledger.retried += 1
                await asyncio.sleep(getattr(error, "retry_after", 0.05))
        ledger.seconds.append(time.perf_counter() - began)
        acked.append((item_id, receipt.position))
        ledger.direct += receipt.path == "direct"
        await asyncio.sleep(max(0.0, due - time.monotonic()))


async def _watch_lag(runtime: Runtime, report: DemoReport) -> None:
    gauge = runtime.metrics["oldest_unflushed_age_seconds"]
    while True:
        ages = [sample.value for metric in gauge.collect() for sample in metric.samples]
        report.flush_lag_max_seconds = max([report.flush_lag_max_seconds, *ages])
        await anyio.sleep(0.05)


async def _count(runtime: Runtime, ledger: _Ledger, report: DemoReport) -> None:
    report.appended = ledger.appended
    report.retried = ledger.retried
    report.appended_without_redis = ledger.direct
    for conversation, acked in ledger.acked.items():
        rows = await conversation_rows(runtime.database, _TENANT, conversation)
        ids = [item_id for item_id, _ in rows]
        there = set(ids)
        report.acked += len(acked)
        report.in_postgres += len(rows)
        report.missing += sum(item_id not in there for item_id, _ in acked)
        report.duplicated += len(ids) - len(there)
        order = [item_id for item_id in ids if item_id in dict(acked)]
        report.out_of_order += sum(a != b for a, (b, _) in zip(order, _present(acked, there), strict=True))
    seconds = sorted(ledger.seconds)
    report.append_p50_ms = round(1000 * seconds[len(seconds) // 2], 3)
    report.append_p99_ms = round(1000 * seconds[int(len(seconds) * 0.99)], 3)
    report.longest_append_seconds = round(seconds[-1], 3)
    report.flush_lag_max_seconds = round(report.flush_lag_max_seconds, 3)


def _present(acked: list[tuple[str, int]], there: set[str]) -> list[tuple[str, int]]:
    return [entry for entry in acked if entry[0] in there]
