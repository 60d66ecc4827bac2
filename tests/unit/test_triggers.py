"""When a backlog is flushed, and how much of it is fetched at once."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from buffer.policy.triggers import Triggers, fetch_count

LIMITS = Triggers(max_turns=100, max_bytes=10_000, interval_seconds=0.5)

amounts = st.integers(-10, 10**13)


@pytest.mark.parametrize(
    ("turns", "nbytes", "waited", "nudged", "trigger"),
    [
        (1, 1, 0.0, False, None),
        (99, 9_999, 0.4999, False, None),
        (100, 1, 0.0, False, "count"),
        (1, 10_000, 0.0, False, "bytes"),
        (1, 1, 0.5, False, "age"),
        (1, 0, 99.0, False, "age"),
        (1, 1, 0.0, True, "nudge"),
        (0, 0, 99.0, False, None),
        (0, 0, 0.0, True, None),
        (0, 20_000, 99.0, True, None),
        (-1, 20_000, 99.0, True, None),
        (100, 10_000, 0.5, False, "count"),
        (1, 10_000, 0.5, False, "bytes"),
        (100, 10_000, 0.5, True, "nudge"),
    ],
)
def test_a_limit_that_is_reached_triggers_and_one_that_is_not_does_not(
    turns: int, nbytes: int, waited: float, nudged: bool, trigger: str | None
) -> None:
    """Each limit to the very number, and nothing at all where nothing waits."""
    assert LIMITS.due(turns, nbytes, waited, nudged=nudged) == trigger


@given(
    st.builds(Triggers, st.integers(1, 10**6), st.integers(1, 10**9), st.floats(0.001, 3600)),
    amounts,
    amounts,
    st.floats(0, 10**6),
    st.booleans(),
)
def test_a_flush_is_due_exactly_when_something_waits_and_a_limit_is_reached(
    limits: Triggers, turns: int, nbytes: int, waited: float, nudged: bool
) -> None:
    """No combination waits longer than the interval, and none flushes an empty shard."""
    reached = (
        nudged or turns >= limits.max_turns or nbytes >= limits.max_bytes or waited >= limits.interval_seconds
    )
    assert (limits.due(turns, nbytes, waited, nudged=nudged) is not None) == (turns > 0 and reached)


@given(amounts, amounts, amounts, amounts)
def test_a_fetch_stays_within_what_is_left(
    turns_left: int, bytes_left: int, backlog_turns: int, backlog_bytes: int
) -> None:
    """Never more turns than are left, and nothing where either is used up."""
    count = fetch_count(turns_left, bytes_left, backlog_turns, backlog_bytes)
    if turns_left <= 0 or bytes_left <= 0:
        assert count == 0
    else:
        assert 1 <= count <= turns_left  # at least one, or a large item would never be fetched


@given(st.integers(1, 10**6), st.integers(1, 10**9), st.integers(1, 10**6), st.integers(1, 10**5))
def test_a_fetch_of_average_entries_fits_the_bytes_and_wastes_none(
    turns_left: int, bytes_left: int, backlog_turns: int, average: int
) -> None:
    """Entries of average size fit what is left (one may exceed it alone), and one more would not."""
    count = fetch_count(turns_left, bytes_left, backlog_turns, backlog_turns * average)
    assert count == 1 or count * average <= bytes_left
    assert count == turns_left or (count + 1) * average > bytes_left


def test_a_fetch_without_a_known_size_is_bounded_by_turns() -> None:
    """A backlog whose bytes are not known yet is not divided by zero."""
    assert fetch_count(500, 8 << 20, 0, 0) == 500
    assert fetch_count(500, 100, 10, 0) == 100
    assert fetch_count(500, 8 << 20, 0, 1 << 40) == 1
