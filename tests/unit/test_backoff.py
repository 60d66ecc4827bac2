"""Back-off: random within a bound that doubles, and that has an end."""

from __future__ import annotations

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from buffer.policy.backoff import full_jitter

seconds = st.floats(0.001, 1000)


@given(st.integers(1, 10**9), seconds, seconds)
def test_a_delay_is_never_negative_and_never_over_the_limit(attempt: int, first: float, most: float) -> None:
    """However many tries there were, the wait is bounded, and no number overflows."""
    assert 0 <= full_jitter(attempt, first, most) <= most


@given(st.integers(1, 40), seconds)
def test_the_bound_doubles_with_each_try(attempt: int, first: float) -> None:
    """The first wait is at most ``first``, the second twice that, and so on."""
    assert full_jitter(attempt, first, float("inf")) <= first * 2 ** (attempt - 1)


@pytest.mark.parametrize(
    ("attempt", "bound"), [(1, 0.05), (2, 0.1), (3, 0.2), (6, 1.6), (7, 2.0), (500, 2.0)]
)
def test_delays_fill_the_whole_range(attempt: int, bound: float) -> None:
    """Full jitter: processes that failed together come back apart, from at once to the bound."""
    random.seed(20_240_101)
    delays = sorted(full_jitter(attempt, 0.05, 2.0) for _ in range(2_000))
    assert delays[0] < 0.02 * bound
    assert 0.45 * bound < delays[1_000] < 0.55 * bound
    assert 0.98 * bound < delays[-1] <= bound
