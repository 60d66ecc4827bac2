"""The judge of the attack on views, against planted histories: what it lets pass, and what it finds."""

from __future__ import annotations

import pytest

from tests.support.view_history import NEVER, Event, Read, faults, moved, states

# Three items, one acked after the other; the second is deleted; the conversation is erased and begins anew.
_HISTORY = [
    Event(1, 10, 11, "a"),
    Event(2, 20, 21, "b"),
    Event(3, 30, 31, "c"),
    Event(4, 40, 41, None, 1, 3),
    Event(5, 50, 51, "d", 1, 5),  # replaces what is after a
    Event(6, 60, 61, None, -1, 6, erases=True),
    Event(7, 70, 71, "e"),
]


def _read(began: float, ended: float, *items: tuple[str, int], last: int | None = -1, turns: int = 9) -> Read:
    return Read(began, ended, turns, True, last, items)


_A, _B, _C, _D, _E = (("a", 1), ("b", 2), ("c", 3), ("d", 5), ("e", 7))


def test_states_follow_the_events() -> None:
    """Items, a deletion, a replacement, an erasure."""
    after_each = [(), (_A,), (_A, _B), (_A, _B, _C), (_A, _C), (_A, _D), (), (_E,)]
    assert states(_HISTORY) == after_each


@pytest.mark.parametrize(
    "read",
    [
        _read(1, 2, last=None),
        _read(12, 13, _A, last=1),
        _read(32, 33, _A, _B, _C, last=3),
        _read(32, 33, _C, turns=1),
        _read(10.5, 20.5, _A, _B),  # under way while both were: with them, with one, or with none
        _read(10.5, 20.5, _A),
        _read(10.5, 20.5),
        _read(42, 43, _A, _C, last=4),
        _read(52, 53, _A, _D, last=5),
        _read(62, 63, last=None),
        _read(72, 73, _E, last=7),
    ],
)
def test_what_can_have_been_is_let_pass(read: Read) -> None:
    """Each of these reads is right."""
    assert faults(_HISTORY, [read]) == []


@pytest.mark.parametrize(
    ("what", "read"),
    [
        ("stale", _read(22, 23, _A)),
        ("stale", _read(12, 13)),  # empty
        ("stale", _read(42, 43, _A, _B, _C)),  # what was deleted
        ("stale", _read(62, 63, _A, _D)),  # what was erased
        ("no state", _read(22, 29, _A, _B, last=1)),
        ("from the future", _read(12, 13, _A, _B)),
        ("from the future", _read(32, 33, _A, _C)),
        ("no state", _read(34, 35, _B)),  # a gap
        ("no state", _read(32, 33, _A, _C, _B)),  # out of order
        ("repeated", _read(32, 33, _A, _B, _B, _C)),
        ("no state", _read(32, 33, _B, ("c", 4))),  # at another position
        ("no state", _read(52, 53, _A, _C, _D)),  # what was replaced
        ("no state", _read(72, 73, _D, _E)),  # brought back
        ("no state", _read(72, 73, _E, last=6)),
        ("no state", _read(32, 33, _A, _B, _C, turns=2)),  # too many
        ("no state", _read(32, 33, _C, turns=2)),  # too few
        ("incomplete", _read(1, 2)._replace(complete=False)),
    ],
)
def test_what_cannot_have_been_is_found(what: str, read: Read) -> None:
    """Each of these reads is wrong, and the reason is told."""
    (fault,) = faults(_HISTORY, [read])
    assert fault.startswith(what), fault


def test_what_ended_without_an_answer_may_be_seen_from_when_it_was_sent_or_never() -> None:
    """It need not be seen, until something after it must be."""
    history = [Event(1, 10, NEVER, "a"), Event(2, 20, 21, "b")]
    assert not faults(history, [_read(12, 13), _read(12, 13, _A), _read(22, 23, _A, _B)])
    assert len(faults(history, [_read(8, 9, _A), _read(22, 23, _B), _read(22, 23)])) == 3


def test_an_item_has_one_position() -> None:
    """Whoever tells another one is found out."""
    assert moved([{"a": 1, "b": 2}, {"a": 1}]) == []
    assert moved([{"a": 1, "b": 2}, {"a": 3}]) == ["a stood at [1, 3]"]
