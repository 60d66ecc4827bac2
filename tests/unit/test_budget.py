"""What fits into a prompt, and where it may be cut."""

from __future__ import annotations

from itertools import accumulate
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from buffer.policy.budget import estimate_tokens, possible_cuts, select


def user(text: str = "hi") -> dict[str, Any]:
    return {"role": "user", "content": text}


def call(call_id: str) -> dict[str, Any]:
    return {"type": "function_call", "call_id": call_id, "name": "f", "arguments": "{}"}


def result(call_id: str) -> dict[str, Any]:
    return {"type": "function_call_output", "call_id": call_id, "output": "1"}


def chat_calls(*ids: str) -> dict[str, Any]:
    return {"role": "assistant", "content": None, "tool_calls": [{"id": i, "type": "function"} for i in ids]}


def chat_result(call_id: str) -> dict[str, Any]:
    return {"role": "tool", "tool_call_id": call_id, "content": "1"}


REASONING = {"type": "reasoning", "summary": []}
SYSTEM = {"role": "system", "content": "be kind"}


@pytest.mark.parametrize(
    ("items", "cuts"),
    [
        ([], [0]),
        ([user(), user()], [0, 1, 2]),
        ([user(), call("a"), result("a"), user()], [0, 1, 3, 4]),
        ([call("a"), call("b"), result("b"), result("a"), user()], [0, 4, 5]),
        ([user(), chat_calls("a", "b"), chat_result("a"), chat_result("b"), user()], [0, 1, 4, 5]),
        ([result("gone"), user(), result("gone"), user()], [1, 3, 4]),
        ([user(), REASONING, call("a"), result("a")], [0, 1, 4]),
        ([REASONING, REASONING, user()], [0, 3]),
        ([user(), call("a")], [0, 1, 2]),
        ([{"type": "web_search_call", "id": "x"}, user()], [0, 1, 2]),
        ([{"role": "tool"}, user()], [1, 2]),
        ([{"tool_calls": "no list"}, {"tool_calls": [1, {"id": 2}]}], [0, 1, 2]),
    ],
)
def test_cuts_are_possible_where_nothing_is_torn_apart(items: list[Any], cuts: list[int]) -> None:
    """Calls stay with results, reasoning with what follows it, and no orphan stands first."""
    assert possible_cuts(items) == cuts


_IDS = st.sampled_from("abc")
_ITEMS = st.lists(
    st.one_of(
        st.just(user()), st.just(REASONING), st.builds(call, _IDS), st.builds(result, _IDS),
        st.builds(chat_calls, _IDS, _IDS), st.builds(chat_result, _IDS), st.just(SYSTEM),
    ),
    max_size=14,
)  # fmt: skip


@given(
    _ITEMS, st.integers(1, 16), st.none() | st.integers(1, 200), st.booleans(), st.sampled_from([0, 20, 90])
)
def test_selection_keeps_as_much_as_fits_and_tears_nothing_apart(
    items: list[Any], turns: int, tokens: int | None, pin: bool, summary: int
) -> None:
    """Against the plain definition: try every possible cut, take the longest that fits."""
    kept = select(items, turns=turns, tokens=tokens, pin_system=pin, summary_tokens=summary)
    if not items:
        assert kept.first == 0
        return

    def cost(first: int) -> tuple[int, int]:
        chosen = [*items[: pin and first > 0 and items[0] == SYSTEM], *items[first:]]
        return len(chosen), sum(map(estimate_tokens, chosen))

    cuts = possible_cuts(items)[:-1] or [0]
    assert kept.summary == (not summary or tokens is None or summary + cost(cuts[-1])[1] <= tokens)
    if tokens is not None:
        tokens -= summary * kept.summary
    fitting = [c for c in cuts if cost(c)[0] <= turns and (tokens is None or cost(c)[1] <= tokens)]
    assert kept.over == (not fitting)
    assert kept.first == (min(fitting) if fitting else cuts[-1])
    assert kept.pinned == (pin and items[0] == SYSTEM and kept.first > 0)


def test_newest_item_that_alone_is_too_long_is_kept_and_flagged() -> None:
    """Better one item too many than an empty prompt."""
    kept = select([user(), user("x" * 4_000)], turns=20, tokens=100)
    assert (kept.first, kept.over) == (1, True)


def test_summary_counts() -> None:
    """Its tokens are taken off the budget."""
    items = [user("x" * 40)] * 5
    each = estimate_tokens(items[0])
    assert select(items, turns=20, tokens=3 * each).first == 2
    assert select(items, turns=20, tokens=3 * each, summary_tokens=each).first == 3


def test_summary_without_room_beside_the_newest_items_is_left_out() -> None:
    """They matter more; alone, and on its own, it is kept if it fits."""
    items = [user("x" * 40)] * 5
    each = estimate_tokens(items[0])
    kept = select(items, turns=20, tokens=2 * each, summary_tokens=each + 1)
    assert (kept.first, kept.summary, kept.over) == (3, False, False)
    kept = select(items, turns=20, tokens=each - 1, summary_tokens=1)
    assert (kept.first, kept.summary, kept.over) == (4, False, True)
    assert select([], turns=20, tokens=10, summary_tokens=10).summary
    assert not select([], turns=20, tokens=10, summary_tokens=11).summary


def test_own_counter_decides() -> None:
    """Whatever it counts."""
    items = [user(str(n)) for n in range(10)]
    weights = list(accumulate(1 for _ in items))
    kept = select(items, turns=20, tokens=19, count=lambda item: weights[int(item["content"])])
    assert kept.first == 8  # 10 + 9


@pytest.mark.parametrize(
    ("text", "least", "most"), [("", 4, 6), ("word " * 100, 100, 150), ("汉" * 100, 50, 110)]
)
def test_estimate_is_of_the_right_size(text: str, least: int, most: int) -> None:
    """English text takes about a token a word."""
    assert least <= estimate_tokens(user(text)) <= most
