"""What the attacks on the path trust can fail: histories with a planted fault are found out."""

from __future__ import annotations

import json
from typing import Any

import pytest

from buffer import Settings
from tests.support.ledger import Seen
from tests.support.processes import Commands
from tests.support.writer_process import body_of
from tests.support.writers import Writer, Writers, history_of, inversions, untrue

pytestmark = pytest.mark.attack


@pytest.fixture
def writers(settings: Settings, commands: Commands) -> Writers:
    """Two processes whose histories are yet to be written."""
    found = Writers(commands)
    for name in ("one", "two"):
        found.by_name[name] = Writer(name, commands.start(settings, "-c", ""))
    return found


def _write(writers: Writers, name: str, *events: list[Any], end: str = "\n") -> None:
    lines = "\n".join(map(json.dumps, events))
    with history_of(writers[name].child, name).open("a") as history:
        history.write(lines + end)
    writers.update()


def _ack(at: float, item_id: str, position: int, level: str = "buffered", path: str = "stream") -> list[Any]:
    return ["ack", at, "c", item_id, position, level, path, False, 0]


def _sent(at: float, item_id: str) -> list[Any]:
    return ["sent", at, "c", item_id]


def _inversions(writers: Writers) -> list[str]:
    return inversions(writers, writers.first_sent())


def test_honest_histories_have_no_fault(writers: Writers) -> None:
    """Two processes, one order; an item that was under way is there or not."""
    _write(writers, "one", _sent(1, "a"), _ack(2, "a", 10), _sent(5, "c"))
    _write(writers, "two", _sent(1.5, "b"), _ack(4, "b", 9), _sent(6, "d"))
    assert not _inversions(writers)
    seen = [
        Seen(item_id, position, body_of(item_id)) for item_id, position in (("b", 9), ("a", 10), ("c", 11))
    ]
    assert not writers.ledger().faults({"c": seen})


def test_item_before_one_that_was_acked_before_it_was_sent_is_found(writers: Writers) -> None:
    """Across processes: what was acked first stands first."""
    _write(writers, "one", _sent(1, "a"), _ack(2, "a", 10))
    _write(writers, "two", _sent(3, "b"), _ack(4, "b", 9))
    (found,) = _inversions(writers)
    assert "out of order" in found


def test_two_positions_of_one_id_are_found(writers: Writers) -> None:
    """Two processes that append the same item get the same position, whichever of the two is stored."""
    _write(writers, "one", _sent(1, "a"), _ack(2, "a", 10))
    _write(writers, "two", _sent(1, "a"), _ack(2, "a", 11))
    for position in (10, 11):
        assert writers.ledger().faults({"c": [Seen("a", position, body_of("a"))]}).altered == [("c", "a")]


def test_acks_of_a_dead_process_may_be_lost_and_only_those(writers: Writers) -> None:
    """Who is declared dead vouches for nothing; the others do."""
    _write(writers, "one", _sent(1, "a"), _ack(2, "a", 10))
    _write(writers, "two", _sent(1, "b"), _ack(2, "b", 11))
    assert writers.ledger(dead={"one"}).faults({}).lost == [("c", "b")]


def test_direct_receipt_that_is_only_buffered_is_found(writers: Writers) -> None:
    """A receipt claims the level of the path that it names."""
    _write(writers, "one", _sent(1, "a"), _ack(2, "a", 10, path="direct"))
    _write(writers, "two", _sent(1, "b"), _ack(2, "b", 11, path="direct", level="stored"))
    (found,) = untrue([*writers["one"].acks, *writers["two"].acks])
    assert "'a'" in found


def test_history_of_a_killed_process_is_read_up_to_its_last_whole_line(writers: Writers) -> None:
    """A line that was cut off is no ack, until the rest of it arrives."""
    line = json.dumps(_ack(2, "a", 10))
    _write(writers, "one", _sent(1, "a"), end="\n" + line[:20])
    assert not writers["one"].acks
    _write(writers, "one", end=line[20:] + "\n")
    assert [ack.id for ack in writers["one"].acks] == ["a"]
