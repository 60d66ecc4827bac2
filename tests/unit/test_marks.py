"""Waiting for a flush: which mark releases whom."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from buffer.model.position import MAX_SEQUENCE, pack
from buffer.stream.marks import Marks


class Nobody:
    """Stands for the two collaborators that `Marks.update` and `wait` do not need to be right."""

    keys = (0,)

    async def nudge(self, *_: int) -> None:
        """Nobody flushes."""


@pytest.fixture
def marks() -> Marks:
    nobody: Any = Nobody()
    return Marks(nobody, nobody)


async def waiting(marks: Marks, position: int) -> asyncio.Task[None]:
    """A waiter that has begun to wait."""
    task = asyncio.create_task(marks.wait(0, position))
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    return task


async def test_a_mark_releases_those_at_and_before_it(marks: Marks) -> None:
    """In any order of waiting; the one after it goes on waiting."""
    tasks = [await waiting(marks, pack(1, n)) for n in (7, 3, 5)]
    marks.update(0, 1, 5)
    await asyncio.gather(tasks[1], tasks[2])
    assert not tasks[0].done()
    marks.update(0, 1, 7)
    await tasks[0]
    await marks.wait(0, pack(1, 6))


async def test_a_mark_of_a_newer_epoch_says_nothing_of_older_positions(marks: Marks) -> None:
    """`stored` must never be claimed because Redis began anew."""
    old = await waiting(marks, pack(1, 5))
    new = await waiting(marks, pack(2, 1))
    marks.update(0, 2, -1)
    last_of_old = await waiting(marks, pack(1, MAX_SEQUENCE))
    marks.update(0, 2, 3)
    await new
    assert not old.done()
    assert not last_of_old.done()
    for task in (old, last_of_old):
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


async def test_an_older_mark_changes_nothing(marks: Marks) -> None:
    """Marks arrive over several ways, and some are late."""
    marks.update(0, 2, 3)
    marks.update(0, 2, 1)
    marks.update(0, 1, 100)
    await marks.wait(0, pack(2, 3))
    task = await waiting(marks, pack(1, 4))
    assert not task.done()
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
