"""``buffer doctor``: what is wrong, or was, and what to do about it."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Annotated, Literal

from cyclopts import Parameter

from buffer.app.runtime import open_database
from buffer.cli.common import EXIT_FAILED, Common, print_json, run
from buffer.errors import BufferError, Unavailable
from buffer.settings import Settings
from buffer.store.ledger import LossLedger
from buffer.store.pool import Database
from buffer.store.shards import ShardStore
from buffer.stream.client import RedisClient

Verdict = Literal["ok", "note", "wrong", "unknown"]

_KEPT = 5


@dataclass(slots=True, frozen=True)
class Finding:
    """One check: its verdict, what was found, and the line that fixes it."""

    check: str
    verdict: Verdict
    found: str
    advice: str = ""


def doctor(
    *,
    json: Annotated[bool, Parameter(negative="", help="One JSON document.")] = False,
    common: Common | None = None,
) -> int:
    """Check both stores, the path, and the ledger of losses. Exits 1 if something is wrong."""
    settings = (common or Common(log_level="warning")).settings()

    async def main() -> list[Finding]:
        async with open_database(settings) as database:
            return [
                *await _path(database),
                *await _losses(database),
                *await _redis(settings),
            ]

    findings = run(main)
    if json:
        print_json({"findings": [asdict(finding) for finding in findings]})
    else:
        for finding in findings:
            print(f"{finding.verdict:<8} {finding.check:<22} {finding.found}")
            if finding.advice:
                print(f"{'':<31} {finding.advice}")
    return EXIT_FAILED if any(finding.verdict == "wrong" for finding in findings) else 0


async def _path(database: Database) -> list[Finding]:
    shards = await ShardStore(database).status()
    modes = sorted({shard.mode for shard in shards})
    unowned = [shard.shard for shard in shards if not shard.owned]
    unclean = [shard.shard for shard in shards if not shard.clean]
    return [
        Finding("path", "ok", "every shard goes through Redis")
        if modes == ["stream"]
        else Finding(
            "path",
            "wrong",
            f"modes {modes}: appends go to Postgres, or wait",
            "Is Redis up, and a `buffer flusher` running that can reach it?",
        ),
        Finding("flushers", "ok", "every shard has an owner")
        if not unowned
        else Finding("flushers", "wrong", f"nobody flushes shards {unowned}", "Start `buffer flusher`."),
        Finding("completeness", "ok", "nobody who may hold acked items is missing")
        if not unclean
        else Finding(
            "completeness",
            "wrong",
            f"shards {unclean} may lack acked items: a process was silent when Redis was lost",
            "Let it come back, or wait: it is written off after BUFFER_WRITE_OFF_SECONDS.",
        ),
    ]


async def _losses(database: Database) -> list[Finding]:
    ledger = LossLedger(database)
    totals = await ledger.totals()
    findings = [
        Finding("losses", "ok", "nothing was ever lost")
        if not totals.lost_turns
        else Finding("losses", "wrong", f"{totals.lost_turns} items are lost, or may be")
    ]
    findings += [
        Finding(
            f"loss ({loss.kind})",
            "wrong",
            f"{loss.at:%F %T} shard {loss.shard}: {loss.turns} items; {loss.detail}",
        )
        for loss in await ledger.losses(_KEPT)
    ]
    findings += [
        Finding(f"incarnation ({change.store})", "note", f"{change.at:%F %T} {change.detail}")
        for change in await ledger.incarnations(_KEPT)
    ]
    if totals.dead_letters:
        findings.append(
            Finding(
                "dead letters", "wrong", f"{totals.dead_letters} items could not be stored", "buffer dlq list"
            )
        )
    return findings


async def _redis(settings: Settings) -> list[Finding]:
    client = RedisClient(settings)
    try:
        info = await client.info("persistence", "memory", "stats")
    except Unavailable as error:
        return [Finding("redis", "wrong", str(error))]
    except BufferError as error:
        return [Finding("redis", "unknown", str(error))]
    finally:
        await client.close()
    aof = bool(info.get("aof_enabled"))
    policy = str(info.get("maxmemory_policy", "unknown"))
    evicts = policy.startswith("allkeys")
    return [
        Finding(
            "append-only file",
            "ok" if aof else "note",
            "on" if aof else "off: only retention protects what is unflushed",
        ),
        Finding(
            "maxmemory-policy",
            "wrong" if evicts else "ok",
            policy,
            "Set maxmemory-policy noeviction (or volatile-*): this one may evict unflushed items."
            if evicts
            else "",
        ),
        Finding(
            "evictions",
            "wrong" if evicts and info.get("evicted_keys") else "ok",
            f"{info.get('evicted_keys', 0)} keys evicted",
        ),
    ]
