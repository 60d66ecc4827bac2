"""How a path manager tells that somebody is silent: only by what it saw itself, by its own clock."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from buffer.policy.watched import Watched

TIMEOUT = 5.0


def test_a_counter_that_stands_still_for_longer_is_silent() -> None:
    """Not at the time-out itself, and with the count at which it stands."""
    watched = Watched()
    for now in range(6):
        watched.see({"p": 7}, float(now))
        assert watched.silent(TIMEOUT, float(now)) == {}
    assert watched.silent(TIMEOUT, 5.01) == {"p": 7}


def test_a_counter_that_moves_begins_anew() -> None:
    """However long it stood before."""
    watched = Watched()
    watched.see({"p": 7}, 0)
    watched.see({"p": 8}, 9)
    assert watched.silent(TIMEOUT, 14) == {}
    assert watched.silent(TIMEOUT, 14.1) == {"p": 8}


def test_a_counter_that_goes_back_begins_anew() -> None:
    """It is another process of that name, or another Postgres: nothing is known of it."""
    watched = Watched()
    watched.see({"p": 7}, 0)
    watched.see({"p": 0}, 4)
    assert watched.silent(TIMEOUT, 9) == {}


def test_who_was_not_seen_for_a_time_out_is_not_judged() -> None:
    """A process that is new to this manager may have been silent for long: that is not known."""
    watched = Watched()
    watched.see({"old": 1}, 0)
    watched.see({"old": 1, "new": 1}, 4)
    assert watched.silent(TIMEOUT, 6) == {"old": 1}


def test_who_is_gone_is_not_silent_and_begins_anew_when_back() -> None:
    """The same count as before proves nothing."""
    watched = Watched()
    watched.see({"p": 7}, 0)
    watched.see({}, 3)
    assert watched.silent(TIMEOUT, 9) == {}
    watched.see({"p": 7}, 10)
    assert watched.silent(TIMEOUT, 15) == {}
    assert watched.silent(TIMEOUT, 15.1) == {"p": 7}


def test_after_forgetting_everybody_begins_anew() -> None:
    """A manager that was out of touch does not know whether they beat meanwhile."""
    watched = Watched()
    watched.see({"p": 7, "q": 1}, 0)
    watched.forget()
    assert watched.silent(TIMEOUT, 100) == {}
    watched.see({"p": 7, "q": 1}, 100)
    assert watched.silent(TIMEOUT, 104) == {}


looks = st.lists(
    st.tuples(
        st.floats(0.01, 4.0),  # seconds since the look before
        st.dictionaries(st.sampled_from("pq"), st.integers(0, 2)),
        st.sampled_from(["see", "see", "see", "forget"]),
    ),
    max_size=30,
)


@given(looks)
def test_silent_are_exactly_those_whose_unchanged_looks_span_a_time_out(
    history: list[tuple[float, dict[str, int], str]],
) -> None:
    """Compared with the definition: the same count in every look back to one that is longer ago."""
    watched, now = Watched(), 0.0
    seen: list[tuple[float, dict[str, int]]] = []
    for pause, counters, what in history:
        now += pause
        if what == "forget":
            watched.forget()
            seen.clear()
            continue
        watched.see(counters, now)
        seen.append((now, counters))
        expected = {}
        for name, count in counters.items():
            since = now
            for at, then in reversed(seen):
                if then.get(name) != count:
                    break
                since = at
            if now - since > TIMEOUT:
                expected[name] = count
        assert watched.silent(TIMEOUT, now) == expected
