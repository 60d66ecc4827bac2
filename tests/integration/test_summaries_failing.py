"""A summarizer that fails, hangs, dies, or is late: summaries wait, and nothing else does."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence

import anyio
import asyncpg
import pytest

from buffer import Buffer, Item, Settings, Summary
from buffer.store.shards import Owned
from buffer.store.summaries import SummaryStore
from buffer.summaries.summarizer import open_summarizer
from buffer.summaries.worker import SummaryWorker
from tests.support.completions import Behaviour, Endpoint, numbers
from tests.support.paths import on_path
from tests.support.polling import eventually
from tests.support.processes import Commands
from tests.support.summaries import EVERY, KEEP, fill, outcomes, summary_through

KEY = "key-that-nobody-sees"
FAILURES: list[Behaviour] = ["status", "garbage", "empty", "cut", "huge", "hang"]


async def test_failing_summarizer_is_asked_again_until_it_is_healthy(
    asking: Settings, model: Endpoint
) -> None:
    """An error, nonsense, nothing, half an answer, too much, none in time: counted, and later made."""
    asking = asking.model_copy(update={"summarizer_timeout_seconds": 0.3})
    async with Buffer.connect(asking, flusher=True) as buffer:
        for behaviour in FAILURES:
            model.behaviour = behaviour
            conversation = buffer.conversation(behaviour)
            failed, made = outcomes(buffer, "failed"), outcomes(buffer, "made")
            positions = await fill(conversation, 0, EVERY + KEEP)
            await eventually(lambda least=failed + 2: outcomes(buffer, "failed") >= least)
            context = await conversation.context()
            assert (context.summary, context.complete, len(context.items)) == (None, True, 15)
            model.behaviour = "odd"  # an answer in parts, with characters that Postgres cannot hold
            summary = await summary_through(conversation, positions[EVERY - 1])
            assert numbers(summary.text) == list(range(EVERY))
            assert outcomes(buffer, "made") == made + 1


async def test_hanging_summarizer_delays_no_flush_and_no_end(asking: Settings, model: Endpoint) -> None:
    """With every worker of the process stuck in a call, items are flushed as ever, and the process closes."""
    model.behaviour = "hang"
    async with Buffer.connect(asking, flusher=True) as buffer:
        for name in "abcdefgh":
            await fill(buffer.conversation(name), 0, EVERY + KEEP)
        await eventually(lambda: model.waiting == 4)
        slowest = 0.0
        for number in range(20):
            for name in "abcdefgh":
                await buffer.conversation(name, user="u").append({}, id=f"x-{number}")
            began = time.monotonic()
            await buffer.flush()
            slowest = max(slowest, time.monotonic() - began)
        assert slowest < 1
        assert model.waiting == 4
        began = time.monotonic()
    assert time.monotonic() - began < 3


async def test_killed_workers_job_is_taken_over(
    settings: Settings, asking: Settings, model: Endpoint, commands: Commands
) -> None:
    """It died in the middle of a call: after its lease another one makes the summary."""
    model.behaviour = "hang"
    slow = asking.model_copy(update={"summarizer_timeout_seconds": 0.8})
    dying = commands.flusher(slow)
    async with Buffer.connect(settings, flusher=False) as buffer:
        await on_path(buffer, "stream")
        positions = await fill(buffer.conversation("c"), 0, EVERY + KEEP)
        await eventually(lambda: model.waiting == 1)
        dying.kill()
        model.behaviour = "answer"
    async with Buffer.connect(slow, flusher=True) as buffer:
        summary = await summary_through(buffer.conversation("c"), positions[EVERY - 1])
        assert numbers(summary.text) == list(range(EVERY))


async def test_nothing_is_summarized_while_postgres_may_lack_items(
    asking: Settings, model: Endpoint, postgres: asyncpg.Connection
) -> None:
    """An item of the conversation is a dead letter: nobody is asked until somebody has dealt with it."""
    await postgres.execute(
        "insert into buffer.dead_letters (tenant, conversation, item_id, position, payload, reason) "
        "values ('default', 'c', 'm-x', 1, '{}', 'test')"
    )
    async with Buffer.connect(asking, flusher=True) as buffer:
        conversation = buffer.conversation("c")
        positions = await fill(conversation, 0, EVERY + KEEP)
        await eventually(lambda: outcomes(buffer, "postponed") >= 2)
        assert not model.requests
        await postgres.execute("delete from buffer.dead_letters")
        await summary_through(conversation, positions[EVERY - 1])


async def test_flusher_that_is_behind_comes_first(asking: Settings, model: Endpoint) -> None:
    """While there is more to flush at once, nobody is asked; then what is due is made."""
    async with Buffer.connect(asking.model_copy(update={"summarizer": "none"}), flusher=True) as buffer:
        conversation = buffer.conversation("c")
        positions = await fill(conversation, 0, EVERY + KEEP)
        await buffer.flush()
        runtime, shard = buffer.runtime, Owned(conversation._target.shard, 1, 1, 0)
        async with open_summarizer(asking) as summarizer, anyio.create_task_group() as tasks:
            assert summarizer is not None
            worker = SummaryWorker(
                asking, runtime.database, summarizer, runtime.metrics, "w", runtime.summary_committed
            )
            worker.committed(shard, [b"default/c"], (), True)
            tasks.start_soon(worker.run)
            for _ in range(10):
                await asyncio.sleep(0.1)
                worker.committed(shard, [b"default/other"], (), True)
            assert not model.requests
            await summary_through(conversation, positions[EVERY - 1])
            tasks.cancel_scope.cancel()


async def test_of_two_that_make_the_same_summary_one_is_kept(buffer: Buffer) -> None:
    """A worker that outlived its lease: its answer is refused, and so is one of a changed predecessor."""
    conversation = buffer.conversation("c")
    positions = await fill(conversation, 0, 20)
    await buffer.flush()
    store, shard = SummaryStore(buffer.runtime.database), conversation._target.shard

    async def write(through: int, text: str) -> Summary | None:
        part = await store.part("default", "c", positions[through], 100, 1 << 20)
        return await store.write("default", "c", shard, part, text, "test")

    early = await store.part("default", "c", positions[5], 100, 1 << 20)
    assert await write(5, "one") is not None
    assert await store.write("default", "c", shard, early, "two", "test") is None
    later = await store.part("default", "c", positions[10], 100, 1 << 20)
    assert later.previous is not None
    await conversation.set_summary("mine", through=positions[5])
    assert await store.write("default", "c", shard, later, "of the old one", "test") is None
    assert await write(10, "of mine") is not None
    shown = (await conversation.context()).summary
    assert shown is not None
    assert (shown.text, shown.through) == ("of mine", positions[10])


async def test_key_is_sent_and_shown_nowhere(
    asking: Settings, model: Endpoint, caplog: pytest.LogCaptureFixture
) -> None:
    """Not in a log line of any level, when all goes well and when it does not."""
    caplog.set_level("DEBUG")
    given = Settings.load(
        **{**asking.model_dump(), "summarizer_api_key": f"{KEY}\n", "summarizer_timeout_seconds": 0.3}
    )
    async with Buffer.connect(given, flusher=True) as buffer:
        conversation = buffer.conversation("c")
        for behaviour in FAILURES:
            model.behaviour = behaviour
            failed = outcomes(buffer, "failed")
            await fill(buffer.conversation(f"c-{behaviour}"), 0, EVERY + KEEP)
            await eventually(lambda failed=failed: outcomes(buffer, "failed") > failed)
        model.behaviour = "answer"
        positions = await fill(conversation, 0, EVERY + KEEP)
        await summary_through(conversation, positions[EVERY - 1])
    assert all(f"authorization: Bearer {KEY}\r\n".lower() in head.lower() for head in model.headers)
    assert "m-1 made no summary" in caplog.text
    assert KEY not in caplog.text
    assert KEY not in repr(given)


async def test_one_conversation_that_cannot_be_summarized_holds_up_no_other(asking: Settings) -> None:
    """A summarizer that fails for some and never answers for others: the rest get theirs."""

    class Picky:
        name = "picky"

        async def summarize(self, previous: str | None, items: Sequence[Item]) -> str:
            assert previous is None
            if numbers(items[0]["content"])[0] >= 1_000:
                raise ZeroDivisionError
            if numbers(items[0]["content"])[0] >= 500:
                await asyncio.Event().wait()
            return "fine"

    asking = asking.model_copy(update={"summarizer_timeout_seconds": 0.2})
    async with Buffer.connect(asking, flusher=True, summarizer=Picky()) as buffer:
        for number in range(6):
            await fill(buffer.conversation(f"failing-{number}"), 1_000, 1_000 + EVERY + KEEP)
            await fill(buffer.conversation(f"hanging-{number}"), 500, 500 + EVERY + KEEP)
        for number in range(3):
            conversation = buffer.conversation(f"good-{number}")
            positions = await fill(conversation, 0, EVERY + KEEP)
            await summary_through(conversation, positions[EVERY - 1])
