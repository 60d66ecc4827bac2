"""``buffer status``: who flushes what, and how far behind it is."""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass
from datetime import datetime
from typing import Annotated, Any

import anyio
from cyclopts import Parameter

from buffer.app.runtime import Runtime
from buffer.cli.common import EXIT_THRESHOLD, Common, print_json, run
from buffer.settings import Settings
from buffer.store.ledger import LossLedger, Totals
from buffer.store.shards import ShardStatus
from buffer.stream.shards import Backlog

_WATCH_SECONDS = 1.0


@dataclass(slots=True, frozen=True)
class Row:
    """One shard, as both stores see it."""

    shard: int
    owner: str | None
    mode: str
    clean: bool
    epoch: int
    granted_epoch: int | None
    fence: int
    unflushed: int
    unflushed_bytes: int
    oldest_age_seconds: float
    flushed_through: int
    flushed_turns: int
    flushed_at: datetime | None


def status(
    *,
    watch: Annotated[bool, Parameter(negative="", help="Again every second, until Ctrl-C.")] = False,
    json: Annotated[
        bool, Parameter(negative="", help="One JSON document (a line each with --watch).")
    ] = False,
    max_lag: Annotated[
        float | None, Parameter(help="Exit 4 if the oldest unflushed item is older than this many seconds.")
    ] = None,
    common: Common | None = None,
) -> int:
    """Show every shard: owner, epoch, unflushed items, age of the oldest, flushed through."""
    settings = (common or Common(log_level="warning")).settings()

    async def main() -> int:
        async with Runtime.open(settings, flusher=False, accepting=False) as runtime:
            ledger = LossLedger(runtime.database)
            while True:
                rows, totals = await collect(runtime), await ledger.totals()
                lag = max((row.oldest_age_seconds for row in rows), default=0.0)
                if json:
                    print_json(document(rows, lag, totals))
                else:
                    print(table(rows, lag, totals, settings), flush=True)
                if max_lag is not None and lag > max_lag:
                    return EXIT_THRESHOLD
                if not watch:
                    return 0
                await anyio.sleep(_WATCH_SECONDS)

    return run(main)


async def collect(runtime: Runtime) -> list[Row]:
    """Both stores' view of every shard. Where the path is not the stream, Redis may well be away."""
    stored = await runtime.store.status()
    streams = [s.shard for s in stored if s.mode == "stream"]
    peeked = dict(zip(streams, await runtime.shards.peek(streams), strict=True)) if streams else {}
    backlogs = [peeked.get(s.shard, Backlog(None, -1, 0, 0, 0, None)) for s in stored]
    now_ms = time.time() * 1000
    return [_row(s, b, now_ms) for s, b in zip(stored, backlogs, strict=True)]


def _row(stored: ShardStatus, backlog: Backlog, now_ms: float) -> Row:
    age = max(0.0, now_ms - backlog.oldest_ms) / 1000 if backlog.oldest_ms is not None else 0.0
    return Row(
        stored.shard,
        stored.owner if stored.owned else None,
        stored.mode,
        stored.clean,
        stored.path_epoch,
        backlog.epoch,
        stored.fence,
        backlog.turns,
        backlog.bytes,
        round(age, 3),
        stored.flushed_through,
        stored.flushed_turns,
        stored.flushed_at,
    )


def document(rows: list[Row], lag: float, totals: Totals) -> dict[str, Any]:
    """What ``--json`` prints. Positions are strings, as everywhere in JSON."""
    shards = [{**asdict(row), "flushed_through": str(row.flushed_through)} for row in rows]
    return {
        "lag_seconds": lag,
        "unflushed": sum(row.unflushed for row in rows),
        "degraded": any(row.mode != "stream" for row in rows),
        "complete": all(row.clean for row in rows),
        **asdict(totals),
        "unowned_shards": [row.shard for row in rows if row.owner is None],
        "shards": shards,
    }


def table(rows: list[Row], lag: float, totals: Totals, settings: Settings) -> str:
    """What a person reads."""
    head = (
        f"{'shard':>5}  {'owner':<38} {'path':<8} {'epoch':>5} {'unflushed':>9} {'oldest':>8}  "
        f"{'flushed through':>20}  {'turns':>10}"
    )
    lines = [head]
    for row in rows:
        granted = row.mode != "stream" or row.granted_epoch == row.epoch
        epoch = str(row.epoch) if granted else f"{row.epoch}!"
        lines.append(
            f"{row.shard:>5}  {row.owner or '- nobody -':<38} {row.mode:<8} {epoch:>5} {row.unflushed:>9} "
            f"{row.oldest_age_seconds:>7.1f}s  {row.flushed_through:>20}  {row.flushed_turns:>10}"
        )
    lines.append(f"lag {lag:.1f} s, {sum(r.unflushed for r in rows)} unflushed, {settings.shards} shards")
    lines += _warnings(rows, totals)
    return "\n".join(lines)


def _warnings(rows: list[Row], totals: Totals) -> list[str]:
    """What somebody should look at."""
    found = []
    if any(row.mode != "stream" for row in rows):
        found.append("DEGRADED: appends go to Postgres, or wait, where the path is not 'stream'")
    if totals.missing:
        found.append(f"INCOMPLETE: {totals.missing} silent processes may hold acked items")
    if totals.lost_turns:
        found.append(f"LOSS: {totals.lost_turns} items are lost or may be; see `buffer doctor`")
    if totals.dead_letters:
        found.append(f"{totals.dead_letters} dead letters; see `buffer dlq list`")
    return found
