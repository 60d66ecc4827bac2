"""What hypothesis draws in several of these tests."""

from __future__ import annotations

from typing import Any

from hypothesis import strategies as st

from buffer.model.ids import MAX_ID_CHARACTERS

# Everything that an id may hold: no control characters, no surrogates, no "/".
id_characters = st.characters(exclude_categories=["Cc", "Cs"], exclude_characters="/")

ids = st.text(id_characters, min_size=1, max_size=MAX_ID_CHARACTERS).filter(
    lambda text: text not in {".", ".."}
)

# Few ids, so that they meet, and short enough to be read in a failure.
few_ids = st.sampled_from(["a", "b", "ab", "b.", "租户", "😀"])


def json_values(text: st.SearchStrategy[str]) -> st.SearchStrategy[Any]:
    """Any JSON value whose strings and keys are drawn from ``text``."""
    edges = [
        0,
        2**53 + 1,
        2**63 - 1,
        2**63,
        2**64 - 1,
        2**64,
        -(2**63),
        -(2**63) - 1,
        10**400,
        1e16,
        -0.0,
        5e-324,
    ]
    leaves = (
        st.none()
        | st.booleans()
        | st.integers()
        | st.sampled_from(edges)
        | st.floats(allow_nan=False, allow_infinity=False)
        | text
    )
    return st.recursive(
        leaves, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(text, inner, max_size=4)
    )
