"""Readers that poll through everything: what they see is always one state that the conversation had."""

from __future__ import annotations

import asyncio
import os
import random
import time

import pytest

from buffer import Buffer, Receipt, Settings

pytestmark = pytest.mark.attack

SECONDS = float(os.environ.get("BUFFER_TEST_READER_SECONDS", "30"))
POLL_SECONDS = 0.02


class History:
    """Every state that one conversation had: the ids of its items, in order, after each append."""

    def __init__(self) -> None:
        self.states: list[tuple[str, ...]] = [()]
        self.acked = 0  # the state that the last ack made
        self.positions: dict[str, int] = {}

    def intend(self, ids: list[str], replace_after: str | None) -> None:
        """An append is about to be sent: from now on, the state that it makes may be seen."""
        now = self.states[-1]
        kept = now if replace_after is None else now[: now.index(replace_after) + 1]
        self.states.append((*kept, *ids))

    def ack(self, receipts: list[Receipt]) -> None:
        """It was acked: from now on, no older state may be seen."""
        self.acked = len(self.states) - 1
        self.positions.update({receipt.id: receipt.position for receipt in receipts})


async def _write(buffer: Buffer, history: History, until: float) -> None:
    conversation = buffer.conversation("watched")
    number = 0
    while time.monotonic() < until:
        now = history.states[-1]
        # Grows to a few hundred items, so that reads go beyond one chunk of the tail, and back.
        back = random.choice((1, 2, 5)) if len(now) < 300 else len(now) - 20
        replace_after = (
            random.choice(now[-back:]) if now and (random.random() < 0.1 or len(now) > 300) else None
        )
        ids = [f"m-{number + i}" for i in range(random.choice((1, 1, 1, 2, 20)))]
        number += len(ids)
        history.intend(ids, replace_after)
        items = [{"role": "user", "content": item_id} for item_id in ids]
        history.ack(await conversation.extend(items, ids=ids, replace_after=replace_after))


async def _read(buffer: Buffer, history: History, until: float) -> int:
    """Poll, each time in another way; the number of reads."""
    conversation = buffer.conversation("watched")
    reads = 0
    while time.monotonic() < until:
        turn_ends = time.monotonic() + POLL_SECONDS
        oldest_allowed = history.acked
        kind, limit = reads % 4, random.choice((1, 20, 150, 1_000))
        if kind == 0:
            items, cut = (await conversation.context(limit)).items, slice(-limit, None)
        elif kind == 1:
            items, cut = (await conversation.items(limit=limit)).items, slice(None, limit)
        elif kind == 2:
            items, cut = (
                (await conversation.items(limit=limit, order="desc")).items[::-1],
                slice(-limit, None),
            )
        else:
            page = await conversation.items(before=1 << 62, limit=limit)
            items, cut = page.items, slice(-limit, None)
        seen = tuple(item.id for item in items)
        allowed = history.states[oldest_allowed:]
        assert any(seen == state[cut] for state in allowed), _difference(seen, [s[cut] for s in allowed])
        assert all(item["content"] == item.id for item in items)
        for item in items:
            assert history.positions.get(item.id, item.position) == item.position
        reads += 1
        await asyncio.sleep(max(0.0, turn_ends - time.monotonic()))
    return reads


def _difference(seen: tuple[str, ...], allowed: list[tuple[str, ...]]) -> str:
    nearest = min(allowed, key=lambda state: len(set(state) ^ set(seen)))
    return (
        f"{len(seen)} items are none of {len(allowed)} states; against the nearest one, "
        f"missing {sorted(set(nearest) - set(seen))[:5]}, extra {sorted(set(seen) - set(nearest))[:5]}, "
        f"repeated {len(seen) - len(set(seen))}"
    )


async def test_reader_sees_one_state_of_the_conversation_at_every_moment(settings: Settings) -> None:
    """Polling every 20 ms, here and in another client: no gap, no repeat, no ack of its own missing."""
    busy = settings.model_copy(update={"flush_interval_seconds": 0.005, "flush_max_turns": 7})
    history = History()
    async with Buffer.connect(busy, flusher=True) as near, Buffer.connect(busy) as far:
        until = time.monotonic() + SECONDS
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(_write(near, history, until))
            readers = [tasks.create_task(_read(buffer, history, until)) for buffer in (near, far)]
    assert len(history.states) > 100
    # On two busy cores a read of this conversation takes its time; fewer would prove little.
    assert min(reader.result() for reader in readers) > 2 * SECONDS
