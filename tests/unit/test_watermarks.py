"""High-water marks: when appends are refused, and what is said about when to come back."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from buffer.policy.watermarks import Flow, Gate, retry_after, seconds_to_full


def test_gate_closes_at_the_high_mark_and_opens_at_the_low_one() -> None:
    """Between the marks it stays as it is, so it does not flutter."""
    gate = Gate(high=100, low=80)
    seen = [(used, gate.see(used)) for used in (0, 99, 100, 120, 90, 81, 80, 90, 99, 100)]
    assert [used for used, closed in seen if closed] == [100, 120, 90, 81, 100]


@given(st.lists(st.floats(0, 200), max_size=30))
def test_gate_is_closed_above_and_open_below_whatever_came_before(history: list[float]) -> None:
    """The past matters between the marks only."""
    gate = Gate(high=100, low=80)
    for used in history:
        closed = gate.see(used)
        assert closed or used < 100
        assert not closed or used > 80


def _flow(inflow: float, drain: float, *, seconds: int = 60) -> Flow:
    flow = Flow()
    for second in range(seconds):
        flow.see(inflow * second, drain * second, float(second))
    return flow


def test_rates_follow_the_counters() -> None:
    """Steady counters give their slope; new ones replace it within a few observations."""
    flow = _flow(1_000, 400)
    assert (flow.inflow, flow.drain) == pytest.approx((1_000, 400), rel=0.01)
    for second in range(60, 90):
        flow.see(60_000, 24_000 + 5_000 * (second - 60), float(second))
    assert (flow.inflow, flow.drain) == (pytest.approx(0, abs=1), pytest.approx(5_000, rel=0.01))


def test_counters_that_begin_anew_are_no_rate() -> None:
    """A wiped Redis counts from 0: that is neither inflow nor drain."""
    flow = _flow(1_000, 400)
    before = (flow.inflow, flow.drain)
    flow.see(0, 0, 61.0)
    assert (flow.inflow, flow.drain) == before
    flow.see(1_000, 400, 62.0)
    assert flow.inflow == pytest.approx(before[0], rel=0.01)


def test_seconds_to_full() -> None:
    """What is left, by how fast it shrinks; never while it does not, and none when it is full."""
    assert seconds_to_full(1_000, 7_000, _flow(1_000, 400)) == pytest.approx(10, rel=0.02)
    assert seconds_to_full(1_000, 7_000, _flow(400, 1_000)) == math.inf
    assert seconds_to_full(1_000, math.inf, _flow(1_000, 400)) == math.inf
    assert seconds_to_full(7_000, 7_000, _flow(400, 1_000)) == 0
    assert seconds_to_full(0, 7_000, Flow()) == math.inf


def test_retry_after_is_when_the_low_mark_is_reached_within_bounds() -> None:
    """By the measured drain rate; not at once, and not in an hour."""
    assert retry_after(used=1_000, low=800, drain=20) == 10
    assert retry_after(used=801, low=800, drain=1e9) == 0.5
    assert retry_after(used=1e12, low=800, drain=1) == 60
    assert 1 <= retry_after(used=1_000, low=800, drain=0) <= 60
