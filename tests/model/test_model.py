"""The path protocol holds under random schedules, needs each of its rules, and replays from a seed.

`BUFFER_TEST_MODEL_BASE` moves the range of seeds, `BUFFER_TEST_MODEL_SEEDS` sets how many each profile gets.
"""

from __future__ import annotations

import os

import pytest

from tests.model.explore import PROFILES, main, run, search
from tests.model.postgres import HEARTBEAT_TICKS
from tests.model.rules import ALL, Rule

_SEED_BASE = int(os.environ.get("BUFFER_TEST_MODEL_BASE", "0"))
_SEEDS = int(os.environ.get("BUFFER_TEST_MODEL_SEEDS", "110"))
_SEARCHED = 3000

# Where it shows quickly what a rule is for: a profile, and a seed of it at which the search begins.
_NEEDED_IN = {
    Rule.GRANT_EPOCH: ("flushall", 0),
    Rule.GRANT_MEMBER: ("suspend", 30),
    Rule.GRANT_OVER_FENCE: ("twice", 160),
    Rule.RUN_ID: ("promote", 0),
    Rule.RUN_ID_MANAGER: ("promote", 0),
    Rule.LATE_REPLY: ("flushall", 0),
    Rule.PERMIT: ("stop-alone", 50),
    Rule.RETAIN_DUPLICATES: ("stop", 0),
    Rule.RETAIN_SERVED: ("promote", 0),
    Rule.MARK_EPOCH: ("twice", 470),
    Rule.LOOK_UP_IDS: ("restart", 0),
    Rule.IDS_FIRST: ("two-if-match", 380),
    Rule.CLOSE_COMPARES: ("twice", 50),
    Rule.FLUSH_CHECKS_PATH: ("stale-flush", 50),
    Rule.SPILL_BARRIER: ("rewind", 0),
    Rule.SPILL_CONFIRMS: ("empty", 0),
    Rule.ABSENT_IS_MISSING: ("slow-flush", 0),
    Rule.JUDGE_PATIENTLY: ("outage", 0),
    Rule.DIRECT_CHECKS_PATH: ("flushall", 10),
    Rule.DIRECT_NUMBERS: ("flushall", 190),
    Rule.DIRECT_ONCE: ("stop", 0),
    Rule.IF_MATCH_CLEAN: ("blind", 100),
    Rule.READ_SNAPSHOT: ("slow-flush", 200),
    Rule.COMPLETE_IF_CLEAN: ("slow-flush", 0),
    Rule.SALVAGE_UNCLEAN: ("long-stop", 0),
    Rule.SALVAGE_ONLY_UNCLEAN: ("stop", 0),
    Rule.SALVAGE_LAST_EPOCH: ("fail-back", 20),
    Rule.GO_BACK_CLEAN: ("slow-flush", 0),
    Rule.CONFIRM_BEFORE_STREAM: ("write-off", 0),
    Rule.KICK_FIRST: ("suspend", 30),
    Rule.UNREGISTER_FLUSHED: ("slow-flush", 40),
    Rule.WRITE_OFF_SALVAGED: ("long-stop", 0),
    Rule.WRITTEN_OFF: ("write-off", 0),
    Rule.REJOIN_SPILLS: ("slow-flush", 0),
    Rule.FLUSH_ONCE: ("lossy", 0),
    Rule.FLUSHED_THROUGH: ("quiet", 0),
    Rule.SETTLE_COMPARES: ("lossy", 0),
    Rule.LEASE: ("two-if-match", 50),
    Rule.TAIL_FIRST: ("quiet", 0),
    Rule.READ_CHECKS_PATH: ("stop", 0),
}


@pytest.mark.parametrize("profile", PROFILES)
def test_no_schedule_breaks_an_invariant(profile: str) -> None:
    """With all rules on, whatever fails and whenever, clients were told the truth and the shard recovers."""
    found = search(PROFILES[profile], range(_SEED_BASE, _SEED_BASE + _SEEDS), ALL)
    replay = f"python -m tests.model --profile {profile} --trace --seed"
    assert found is None, f"{found[1]}: {replay} {found[0]}"


def test_every_rule_has_a_schedule_that_needs_it() -> None:
    """A new rule comes with a profile and a seed."""
    assert set(_NEEDED_IN) == ALL


@pytest.mark.parametrize("rule", Rule, ids=lambda rule: rule.name)
def test_without_the_rule_some_schedule_breaks_an_invariant(rule: Rule) -> None:
    """No rule is there in vain, and the model can fail."""
    profile, begin = _NEEDED_IN[rule]
    found = search(PROFILES[profile], range(begin, begin + _SEARCHED), ALL - {rule})
    assert found is not None, f"{rule.name} was not missed in {_SEARCHED} schedules of {profile}"


@pytest.mark.parametrize("profile", ["two-lossy", "three"])
def test_a_seed_replays(profile: str) -> None:
    """The same seed gives the same schedule, step by step."""
    first, second = (run(7, PROFILES[profile], tracing=True).world.trace for _ in range(2))
    assert first == second
    assert first


def test_a_traced_schedule_is_the_same_as_an_untraced_one() -> None:
    """Looking does not change what happens: a seed found without a trace replays with one."""
    traced, untraced = (run(7, PROFILES["three"], tracing=tracing).world for tracing in (True, False))
    assert [ack[:4] for ack in traced.history.acks] == [ack[:4] for ack in untraced.history.acks]
    assert traced.schedule.now == untraced.schedule.now


def test_appends_go_on_while_postgres_is_away() -> None:
    """The permit to ack outlives the heartbeats, as long as Postgres is away for the flushers, too."""
    outages = acked = 0
    for seed in range(_SEED_BASE, _SEED_BASE + 40):
        world = run(seed, PROFILES["outage"]).world
        for began, ended in world.postgres.away_ticks:
            if ended - began > HEARTBEAT_TICKS * 5 // 4:
                outages += 1
                acked += any(began + HEARTBEAT_TICKS < ack.at < ended for ack in world.history.acks)
    assert outages > 5
    assert acked >= outages * 3 // 4


def test_the_command_prints_a_failing_schedule(capsys: pytest.CaptureFixture[str]) -> None:
    """A violation comes with its seed and its steps, and a non-zero exit."""
    arguments = ["--profile", "quiet", "--seeds", "50", "--without", "TAIL_FIRST", "--trace"]
    assert main(arguments) == 1
    printed = capsys.readouterr().out
    assert "STALE" in printed
    assert "ACK" in printed
