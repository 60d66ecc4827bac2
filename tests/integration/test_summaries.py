"""Summaries by a worker: rolled forward, and never of what is gone."""

from __future__ import annotations

import json
from collections.abc import Awaitable, Callable, Sequence

import asyncpg
import pytest

from buffer import Buffer, Conversation, Item, Settings, Summary
from buffer.app.runtime import Runtime
from buffer.summaries.worker import MOST_ITEMS
from buffer.transfer import import_file
from tests.support.completions import Endpoint, numbers
from tests.support.polling import eventually
from tests.support.summaries import EVERY, KEEP, fill, outcomes, summary_through

# --- what is made


async def test_summary_covers_all_but_the_newest_items_and_is_rolled_forward(
    asking: Settings, model: Endpoint
) -> None:
    """Exactly the items up to its position, each once, from the summary before it; all items stay."""
    async with Buffer.connect(asking, flusher=True) as buffer:
        conversation = buffer.conversation("c")
        positions = await fill(conversation, 0, EVERY + KEEP)
        first = await summary_through(conversation, positions[EVERY - 1])
        assert (first.through, first.made_by) == (positions[EVERY - 1], "m-1")
        assert numbers(first.text) == list(range(EVERY))
        assert first.created_at is not None
        positions += await fill(conversation, EVERY + KEEP, 37)
        second = await summary_through(conversation, positions[-1 - KEEP])
        assert numbers(second.text) == list(range(37 - KEEP))
        assert f"The summary so far:\n{first.text}\n" in model.material()
        assert numbers(model.material()) == list(range(37 - KEEP))
        page = await conversation.items(limit=100)
        assert len(page.items) == 37
        message = (await conversation.context(3)).messages()[0]
        assert message["role"] == "system"
        assert second.text in message["content"]


async def test_no_summary_is_made_before_enough_items_are_uncovered(
    asking: Settings, model: Endpoint, postgres: asyncpg.Connection
) -> None:
    """One item fewer, in several conversations, queues nothing and asks nobody."""
    async with Buffer.connect(asking, flusher=True) as buffer:
        for name in ("a", "b"):
            await fill(buffer.conversation(name), 0, EVERY + KEEP - 1)
        positions = await fill(buffer.conversation("enough"), 0, EVERY + KEEP)
        await summary_through(buffer.conversation("enough"), positions[EVERY - 1])
        assert len(model.requests) == 1
        assert await postgres.fetchval("select count(*) from buffer.summaries") == 1

        async def nothing_is_due() -> bool:
            return await postgres.fetchval("select count(*) from buffer.summary_work") == 0

        await eventually(nothing_is_due)


async def test_long_conversation_is_covered_in_bounded_steps(asking: Settings, model: Endpoint) -> None:
    """Found once by a flusher that has not seen it; no call gets more than its share."""
    count = 2 * MOST_ITEMS + 50
    silent = asking.model_copy(update={"summarizer": "none"})
    async with Buffer.connect(silent, flusher=True) as buffer:
        positions = await fill(buffer.conversation("c"), 0, count)
        await buffer.flush()
    async with Buffer.connect(asking, flusher=True) as buffer:
        conversation = buffer.conversation("c")
        positions += await fill(conversation, count, count + 1)
        summary = await summary_through(conversation, positions[-1 - KEEP])
        assert numbers(summary.text) == list(range(count + 1 - KEEP))
    follow = [len(numbers(r["messages"][-1]["content"].partition("that follow:")[2])) for r in model.requests]
    assert follow == [MOST_ITEMS, MOST_ITEMS, 51 - KEEP]


async def test_what_is_asked_for_during_the_work_is_done_after_it(asking: Settings, model: Endpoint) -> None:
    """Items that come while a model is at work are covered, though none comes after it."""
    model.behaviour = "hang"
    async with Buffer.connect(asking, flusher=True) as buffer:
        conversation = buffer.conversation("c")
        await fill(conversation, 0, EVERY + KEEP)
        await eventually(lambda: model.waiting == 1)
        positions = await fill(conversation, EVERY + KEEP, 60)
        await buffer.flush()

        async def asked_again() -> bool:
            async with buffer.runtime.database.connection() as connection:
                return await connection.fetchval("select wanted from buffer.summary_work") > 1

        await eventually(asked_again)
        model.behaviour = "answer"
        model.released.set()
        summary = await summary_through(conversation, positions[-1 - KEEP])
        assert numbers(summary.text) == list(range(60 - KEEP))


async def test_large_items_are_covered_in_bounded_steps(asking: Settings, model: Endpoint) -> None:
    """By bytes: an item that alone is more than a call gets is still covered."""
    async with Buffer.connect(asking, flusher=True) as buffer:
        conversation = buffer.conversation("c")
        for number in range(EVERY + KEEP):
            body = {"role": "user", "content": f"n={number} " + "x" * 300_000}
            receipt = await conversation.append(body, timeout=10)
        positions = [item.position for item in (await conversation.items()).items]
        summary = await summary_through(conversation, positions[EVERY - 1])
        assert numbers(summary.text) == list(range(EVERY))
        assert receipt.position > summary.through
    assert len(model.requests) == EVERY
    assert all(len(str(request)) < 20_000 for request in model.requests)


async def test_nothing_is_queued_where_nobody_summarizes(
    buffer: Buffer, postgres: asyncpg.Connection
) -> None:
    """Without a summarizer the flusher does nothing for it."""
    await fill(buffer.conversation("c"), 0, 100)
    await buffer.flush()
    assert await postgres.fetchval("select count(*) from buffer.summary_work") == 0
    assert (await buffer.conversation("c").context()).summary is None


async def test_applications_summarizer_is_asked_with_items(asking: Settings) -> None:
    """One of the application's own wins over the settings; it gets items with their positions."""

    class Own:
        name = "own"

        def __init__(self) -> None:
            self.calls: list[tuple[str | None, list[int]]] = []

        async def summarize(self, previous: str | None, items: Sequence[Item]) -> str:
            self.calls.append((previous, [item.position for item in items]))
            return f"{previous} and {len(items)} more"

    own = Own()
    async with Buffer.connect(asking, flusher=True, summarizer=own) as buffer:
        positions = await fill(buffer.conversation("c"), 0, EVERY + KEEP)
        summary = await summary_through(buffer.conversation("c"), positions[EVERY - 1])
    assert (summary.text, summary.made_by) == ("None and 10 more", "own")
    assert own.calls == [(None, positions[:EVERY])]


async def test_tokens_include_the_summary(settings: Settings) -> None:
    """It takes room from items; where there is no room for it beside the newest item, it is left out."""
    async with Buffer.connect(settings, flusher=True) as buffer:
        conversation = buffer.conversation("c")
        positions = await fill(conversation, 0, 10)
        await conversation.set_summary("word " * 100, through=positions[4])
        one = (await conversation.context(tokens=1_000)).items
        assert len(one) == 10
        narrow = await conversation.context(tokens=150)
        assert narrow.summary is not None
        assert 0 < len(narrow.items) < 10
        none = await conversation.context(tokens=60)
        assert (none.summary, none.summary_left_out, none.over_budget) == (None, True, False)
        assert len(none.items) > 1


async def test_new_summary_is_noted_for_views_in_its_own_transaction(
    patient: Buffer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever made it may die before it drops the view: a flusher does, and reads show the summary."""

    async def died(*_: object) -> None:
        pass

    monkeypatch.setattr(Runtime, "summary_committed", died)
    conversation = patient.conversation("c")
    (position,) = await fill(conversation, 0, 1)
    await patient.flush()
    assert (await conversation.context()).summary is None
    summary = await conversation.set_summary("text", through=position)
    assert await summary_through(conversation, position) == summary


async def test_old_summaries_do_not_pile_up(buffer: Buffer, postgres: asyncpg.Connection) -> None:
    """A few stay for when the newest ones are taken away."""
    conversation = buffer.conversation("c")
    for position in await fill(conversation, 0, 20):
        await conversation.set_summary("text", through=position)
    assert await postgres.fetchval("select count(*) from buffer.summaries") == 5


async def test_whoever_keeps_views_is_told_of_each_summary(
    asking: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After its commit, of the worker's and of the application's."""
    told: list[tuple[str, str, Summary]] = []

    async def note(_: Runtime, tenant: str, conversation: str, summary: Summary) -> None:
        told.append((tenant, conversation, summary))

    monkeypatch.setattr(Runtime, "summary_committed", note)
    async with Buffer.connect(asking, flusher=True) as buffer:
        conversation = buffer.conversation("c", tenant="t")
        positions = await fill(conversation, 0, EVERY + KEEP)
        made = await summary_through(conversation, positions[EVERY - 1])
        await eventually(lambda: told)
        own = await conversation.set_summary("mine", through=positions[-1])
    assert told == [("t", "c", made), ("t", "c", own)]


# --- what is removed


async def _delete(conversation: Conversation) -> None:
    await conversation.delete_item("m-3")


async def _replace(conversation: Conversation) -> None:
    await conversation.append({"role": "user", "content": "n=90"}, replace_after="m-2", durability="stored")


async def _erase(conversation: Conversation) -> None:
    await conversation.delete()


Removal = Callable[[Conversation], Awaitable[None]]
Left = Callable[[range], list[int]]
REMOVALS = pytest.mark.parametrize(
    ("remove", "left"),
    [
        (_delete, lambda numbered: [n for n in numbered if n != 3]),
        (_replace, lambda _: [0, 1, 2, 90]),
        (_erase, lambda _: []),
    ],
    ids=["delete", "replace", "erase"],
)


@REMOVALS
async def test_summary_of_what_was_removed_meanwhile_is_discarded(
    asking: Settings, model: Endpoint, remove: Removal, left: Left
) -> None:
    """Items go while a model is at work on them: its answer is not kept, and made again without them."""
    model.behaviour = "hang"
    async with Buffer.connect(asking, flusher=True) as buffer:
        conversation = buffer.conversation("c")
        await fill(conversation, 0, EVERY + KEEP)
        await eventually(lambda: model.waiting == 1)
        await remove(conversation)
        model.behaviour = "answer"
        model.released.set()
        await eventually(lambda: outcomes(buffer, "discarded") == 1)
        assert (await conversation.context()).summary is None
        await check_made_anew(conversation, left(range(EVERY + KEEP)))


@REMOVALS
async def test_removal_takes_away_summaries_that_may_hold_what_is_removed(
    asking: Settings, model: Endpoint, remove: Removal, left: Left
) -> None:
    """At once, in every read after it; one that ends before it stays; then it is made anew without it."""
    async with Buffer.connect(asking, flusher=True) as buffer:
        conversation = buffer.conversation("c")
        positions = await fill(conversation, 0, 3)
        before = await conversation.set_summary("n=0 n=1 n=2", through=positions[2])
        positions += await fill(conversation, 3, 3 + EVERY + KEEP)
        await summary_through(conversation, positions[-1 - KEEP])
        model.behaviour = "hang"
        await remove(conversation)
        summary = (await conversation.context()).summary
        assert summary is None if remove is _erase else summary == before
        model.behaviour = "answer"
        model.released.set()
        await check_made_anew(conversation, left(range(3 + EVERY + KEEP)))


async def check_made_anew(conversation: Conversation, left: list[int]) -> None:
    """After more items, there is a summary of exactly those that are left."""
    await fill(conversation, 100, 100 + EVERY + KEEP)
    numbered = [*left, *range(100, 100 + EVERY + KEEP)]
    items = (await conversation.items()).items
    assert [numbers(item["content"])[0] for item in items] == numbered
    summary = await summary_through(conversation, items[-1 - KEEP].position)
    assert numbers(summary.text) == numbered[:-KEEP]


async def test_summary_of_what_an_unflushed_item_replaces_is_not_shown(patient: Buffer) -> None:
    """The replacement is acked and in the tail; Postgres still has the summary. In every way to read it."""
    conversation = patient.conversation("c")
    positions = await fill(conversation, 0, 10)
    kept = await conversation.set_summary("n=0 n=1", through=positions[1])
    await conversation.append({}, replace_after="m-5")
    for turns in (1, 5, 1_000):
        assert (await conversation.context(turns)).summary == kept
    await conversation.append({}, replace_after="m-0")
    for turns in (1, 5, 1_000):
        assert (await conversation.context(turns)).summary is None
    await patient.flush()
    for turns in (1, 5, 1_000):
        assert (await conversation.context(turns)).summary is None


async def test_deletion_makes_a_conversation_due_again(asking: Settings) -> None:
    """One deletion takes a summary away, and nothing is appended: it is made anew all the same."""
    async with Buffer.connect(asking, flusher=True) as buffer:
        conversation = buffer.conversation("c")
        positions = await fill(conversation, 0, 40)
        await summary_through(conversation, positions[-1 - KEEP])
        await conversation.delete_item("m-3")
        summary = await summary_through(conversation, positions[-1 - KEEP])
        assert numbers(summary.text) == [n for n in range(40 - KEEP) if n != 3]


async def test_import_of_older_items_takes_away_summaries_without_them(asking: Settings) -> None:
    """They stand before what a summary covers: it is made anew with them; the application's own stays."""
    lines = [json.dumps({"conversation_id": "c", "items": [{"role": "user", "content": "n=77"}]})]
    async with Buffer.connect(asking, flusher=True) as buffer:
        conversation, other = buffer.conversation("c"), buffer.conversation("other")
        positions = await fill(conversation, 0, EVERY + KEEP)
        (there,) = await fill(other, 0, 1)
        await other.set_summary("mine", through=there)
        await summary_through(conversation, positions[EVERY - 1])
        lines.append(lines[0].replace('"c"', '"other"'))
        report = await import_file(buffer.runtime.database, lines, tenant="default")
        assert report.stored == 2

        async def gone() -> bool:  # a flusher drops the view
            return (await conversation.context()).summary is None

        await eventually(gone)
        mine = (await other.context()).summary
        assert mine is not None
        assert mine.text == "mine"
        (last,) = await fill(conversation, 15, 16)
        await conversation.delete_item("m-15")  # a change, which makes the flusher look
        summary = await summary_through(conversation, positions[EVERY - 1])
        assert numbers(summary.text) == [77, *range(EVERY)]
        assert last > summary.through
