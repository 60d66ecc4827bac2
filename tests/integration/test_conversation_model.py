"""A conversation is a list: any order of appends, removals, erasures, flushes and reads, held against one.

``BUFFER_TEST_MODEL_EXAMPLES=2000`` makes it run for longer, and look for the shortest failure.
"""

from __future__ import annotations

import asyncio
import itertools
import os
from collections.abc import Awaitable
from typing import Any, NamedTuple, TypeVar

import pytest
from hypothesis import HealthCheck, Phase
from hypothesis import settings as given_settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, precondition, rule, run_state_machine_as_test
from redis.asyncio import Redis

from buffer import Buffer, Conflict, NotFound, PreconditionFailed, Settings
from tests.support.paths import on_path

_T = TypeVar("_T")

_asked = os.environ.get("BUFFER_TEST_MODEL_EXAMPLES")
EXAMPLES = int(_asked or 80)
# Making a failure short takes longer than a test may.
PHASES = list(Phase) if _asked else [Phase.generate]
STEPS = 30

_conversations = (f"c{number}" for number in itertools.count())
_counter = itertools.count()

# Few, so that they meet; None is made by the buffer.
_ids = st.one_of(st.none(), st.sampled_from([f"m-{number}" for number in range(8)]))
_picks = st.integers(0, 999)


class Turn(NamedTuple):
    """An item of the model."""

    id: str
    position: int
    body: dict[str, Any]


class World(NamedTuple):
    """What the machine works on. Its rules run in a thread of their own."""

    loop: asyncio.AbstractEventLoop
    buffer: Buffer
    redis: Redis


class ConversationModel(RuleBasedStateMachine):
    """One conversation and the list that it should be."""

    def __init__(self, world: World) -> None:
        super().__init__()
        self._world = world
        self.buffer = world.buffer
        self.conversation = self.buffer.conversation(next(_conversations), user="u")
        self.turns: list[Turn] = []
        self.gone: dict[str, dict[str, Any]] = {}  # deleted or replaced since the last erasure
        self.last = 0  # the last position that was told, of an item

    def run_on_loop(self, call: Awaitable[_T]) -> _T:
        """The result of a coroutine in the loop of the servers' clients."""

        async def called() -> _T:
            return await call

        return asyncio.run_coroutine_threadsafe(called(), self._world.loop).result(20)

    def _note(self, ids: list[str | None], bodies: list[dict[str, Any]], receipts: list[Any]) -> None:
        assert [r.id for r in receipts if r.id not in ids] == [
            r.id for r, given in zip(receipts, ids, strict=True) if given is None
        ]
        for receipt, body in zip(receipts, bodies, strict=True):
            assert not receipt.duplicate
            assert receipt.position > self.last
            self.last = receipt.position
            self.turns.append(Turn(receipt.id, receipt.position, body))

    def _remove(self, turns: list[Turn]) -> None:
        for turn in turns:
            self.turns.remove(turn)
            self.gone[turn.id] = turn.body

    def _is_free(self, item_id: str | None) -> bool:
        return item_id is None or (item_id not in self.gone and item_id not in {t.id for t in self.turns})

    @rule(item_id=_ids)
    def append(self, item_id: str | None) -> None:
        """One item; under an id that is taken it is a conflict, also if its item was removed."""
        body = {"n": next(_counter)}
        if self._is_free(item_id):
            receipt = self.run_on_loop(self.conversation.append(body, id=item_id))
            self._note([item_id], [body], [receipt])
        else:
            with pytest.raises(Conflict):
                self.run_on_loop(self.conversation.append(body, id=item_id))

    @precondition(lambda self: self.turns or self.gone)
    @rule(pick=_picks)
    def repeat(self, pick: int) -> None:
        """An append once more: the first receipt; of an item that was removed, that or a conflict."""
        known = {**self.gone, **{turn.id: turn.body for turn in self.turns}}
        item_id = sorted(known)[pick % len(known)]
        try:
            receipt = self.run_on_loop(self.conversation.append(known[item_id], id=item_id))
        except Conflict:
            assert item_id in self.gone
            return
        assert receipt.duplicate
        if item_id not in self.gone:
            assert receipt.position == next(turn.position for turn in self.turns if turn.id == item_id)

    @rule(ids=st.lists(_ids, min_size=2, max_size=5))
    def extend(self, ids: list[str | None]) -> None:
        """A batch, whole; its ids are free, or made."""
        given = [item_id for item_id in ids if item_id is not None]
        ids = [i if self._is_free(i) and given.count(str(i)) == 1 else None for i in ids]
        bodies = [{"n": next(_counter)} for _ in ids]
        self._note(ids, bodies, self.run_on_loop(self.conversation.extend(bodies, ids=ids)))

    @precondition(lambda self: self.turns)
    @rule(pick=_picks, count=st.integers(1, 3))
    def replace_after(self, pick: int, count: int) -> None:
        """The items after one of them are replaced by others."""
        at = pick % len(self.turns)
        bodies = [{"n": next(_counter)} for _ in range(count)]
        receipts = self.run_on_loop(self.conversation.extend(bodies, replace_after=self.turns[at].id))
        self._remove(self.turns[at + 1 :])
        self._note([None] * count, bodies, receipts)

    @rule(stale=st.booleans())
    def append_if_match(self, stale: bool) -> None:
        """The last position of a context is the one to name, and only until the next append."""
        context = self.run_on_loop(self.conversation.context())
        expected = context.last_position or 0
        assert expected >= (self.turns[-1].position if self.turns else 0)
        if stale:
            self.append(None)
            with pytest.raises(PreconditionFailed) as caught:
                self.run_on_loop(self.conversation.append({}, if_match=expected))
            assert caught.value.last_position == self.last
        else:
            body = {"n": next(_counter)}
            receipt = self.run_on_loop(self.conversation.append(body, if_match=expected))
            self._note([None], [body], [receipt])

    @rule()
    def pop(self) -> None:
        """The latest item, or None."""
        popped = self.run_on_loop(self.conversation.pop())
        if not self.turns:
            assert popped is None
            return
        assert popped is not None
        assert Turn(popped.id, popped.position, dict(popped)) == self.turns[-1]
        self._remove(self.turns[-1:])

    @precondition(lambda self: self.turns)
    @rule(pick=_picks)
    def delete_item(self, pick: int) -> None:
        """Any item."""
        turn = self.turns[pick % len(self.turns)]
        self.run_on_loop(self.conversation.delete_item(turn.id))
        self._remove([turn])

    @precondition(lambda self: self.gone)
    @rule(pick=_picks)
    def delete_what_is_gone(self, pick: int) -> None:
        """It is not found."""
        with pytest.raises(NotFound):
            self.run_on_loop(self.conversation.delete_item(sorted(self.gone)[pick % len(self.gone)]))

    @rule(anew=st.booleans())
    def erase(self, anew: bool) -> None:
        """Everything; every id is free again, also for what is appended at the same moment."""
        body = {"n": next(_counter)}

        async def both() -> tuple[Any, Any]:
            erasing = asyncio.create_task(self.conversation.delete())
            if anew:
                await asyncio.sleep(0)
                return await asyncio.gather(erasing, self.conversation.append(body, id="during"))
            return await erasing, None

        if anew and not self._is_free("during"):
            anew = False
        erased, receipt = self.run_on_loop(both())
        assert erased.through > self.last
        self.turns, self.gone, self.last = [], {}, erased.through
        if receipt is not None and receipt.position > erased.through:
            self._note(["during"], [body], [receipt])

    @rule()
    def flush(self) -> None:
        """Everything goes to Postgres."""
        self.run_on_loop(self.buffer.flush())

    @rule()
    def evict(self) -> None:
        """Cached views are gone, as under memory pressure."""

        async def evicted() -> None:
            views = f"{self.buffer.settings.key_prefix}:*:view:*"
            keys = [key async for key in self._world.redis.scan_iter(views)]
            if keys:
                await self._world.redis.delete(*keys)

        self.run_on_loop(evicted())

    @rule(turns=st.integers(1, 12))
    def read_context(self, turns: int) -> None:
        """The newest items."""
        context = self.run_on_loop(self.conversation.context(turns))
        assert context.complete
        assert [Turn(i.id, i.position, dict(i)) for i in context.items] == self.turns[-turns:]

    @rule(limit=st.integers(1, 5), order=st.sampled_from(["asc", "desc"]))
    def read_pages(self, limit: int, order: Any) -> None:
        """All items, page by page, either way."""

        async def walk() -> list[Turn]:
            seen: list[Turn] = []
            while True:
                after = seen[-1].position if seen else None
                page = await self.conversation.items(limit=limit, order=order, after=after)
                assert page.complete
                assert len(page.items) <= limit
                seen += [Turn(i.id, i.position, dict(i)) for i in page.items]
                if not page.has_more:
                    return seen

        assert self.run_on_loop(walk()) == (self.turns if order == "asc" else self.turns[::-1])


@pytest.mark.parametrize("restless", [True, False], ids=["flushed all the time", "flushed when asked"])
async def test_a_conversation_is_a_list_whatever_happens_to_it(
    settings: Settings, redis: Redis, restless: bool
) -> None:
    """Views are cut back after a few items, evicted, and filled again."""
    changes = {
        "flush_interval_seconds": 0.005 if restless else 60.0,
        "view_max_items": 4,
        "view_max_bytes": 600,
    }
    async with Buffer.connect(settings.model_copy(update=changes), flusher=True) as buffer:
        await on_path(buffer, "stream")
        world = World(asyncio.get_running_loop(), buffer, redis)
        await asyncio.to_thread(
            run_state_machine_as_test,
            lambda: ConversationModel(world),
            settings=given_settings(
                deadline=None,
                max_examples=EXAMPLES // 2,
                stateful_step_count=STEPS,
                phases=PHASES,
                suppress_health_check=list(HealthCheck),
            ),
        )
