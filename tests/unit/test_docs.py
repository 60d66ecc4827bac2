"""The documents name what is there."""

from __future__ import annotations

import re
from pathlib import Path

from tests.support.processes import REPOSITORY

_TESTS = {
    name
    for file in (REPOSITORY / "tests").rglob("test_*.py")
    for name in re.findall(r"^(?:async )?def (test_\w+)", file.read_text("utf-8"), re.MULTILINE)
}


def _named_in(document: Path) -> set[str]:
    return set(re.findall(r"`(test_\w+)`", document.read_text("utf-8")))


def test_every_test_that_the_guarantees_name_exists() -> None:
    """A promise without its test is not one."""
    named = _named_in(REPOSITORY / "docs" / "guarantees.md")
    assert len(named) > 20
    assert not named - _TESTS


def test_every_attack_stands_in_the_guarantees() -> None:
    """What is attacked is promised somewhere; the checker's own tests are not attacks."""
    attacks = {
        name
        for file in (REPOSITORY / "tests" / "attack").glob("test_*.py")
        if file.name != "test_ledger.py"
        for name in re.findall(r"^async def (test_\w+)", file.read_text("utf-8"), re.MULTILINE)
    }
    documents = _named_in(REPOSITORY / "docs" / "guarantees.md")
    assert (
        not attacks
        - documents
        - {
            # Variants of one that is named.
            "test_copy_that_cannot_go_on_is_given_up_and_done_again",
            "test_flusher_stopped_anywhere_and_woken_changes_nothing",
            "test_flushers_that_take_shards_from_each_other_lose_and_double_nothing",
            "test_flush_of_a_former_owner_is_fenced",
            "test_append_whose_answer_is_lost_is_stored_once",
            "test_stalled_network_is_unknown_and_then_stored_once",
            "test_appends_begun_in_order_stay_in_order_when_their_connection_breaks",
            "test_if_match_that_postgres_answered_too_early_does_not_pass",
            "test_slow_network_keeps_order",
        }
    )
