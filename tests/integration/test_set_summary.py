"""Summaries of the application's own: where they may stand, and what is refused."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from buffer import Buffer, Conflict, InvalidRequest, NotFound, Settings, TooLarge, Unavailable
from tests.support.paths import on_path
from tests.support.polling import eventually
from tests.support.summaries import fill


async def test_summary_is_what_was_set_in_every_context(buffer: Buffer, settings: Settings) -> None:
    """In this process and in another one; who made it, and when, beside it; the items stay."""
    conversation = buffer.conversation("c", tenant="t")
    positions = await fill(conversation, 0, 5)
    async with Buffer.connect(settings) as other:
        assert (await other.conversation("c", tenant="t").context()).summary is None
        summary = await conversation.set_summary("what was said \N{GRINNING FACE}", through=positions[2])
        assert (summary.text, summary.through) == ("what was said \N{GRINNING FACE}", positions[2])
        assert summary.made_by == "application"
        assert summary.created_at is not None
        context = await other.conversation("c", tenant="t").context()
        assert context.summary == summary
        assert (await other.conversation("c", tenant="t").context(turns=1_000)).summary == summary
        assert len(context.items) == 5
        assert (await other.conversation("c", tenant="u").context()).summary is None


async def test_summary_moves_forward_and_never_back(buffer: Buffer) -> None:
    """Further on it is the next one; at the same place it takes the other's; before it, it is a conflict."""
    conversation = buffer.conversation("c")
    positions = await fill(conversation, 0, 5)
    await conversation.set_summary("one", through=positions[1])
    second = await conversation.set_summary("two", through=positions[3])
    with pytest.raises(Conflict, match=f"through is {positions[2]} .* summary through {positions[3]}"):
        await conversation.set_summary("back", through=positions[2])
    assert (await conversation.context()).summary == second
    third = await conversation.set_summary("two, corrected", through=positions[3])
    assert (await conversation.context()).summary == third


async def test_of_concurrent_summaries_the_furthest_stands(buffer: Buffer) -> None:
    """Each is kept or refused; the one that goes furthest is never refused, and is what a read shows."""
    conversation = buffer.conversation("c")
    positions = await fill(conversation, 0, 12)
    await buffer.flush()
    calls = [conversation.set_summary(f"{n}", through=positions[n]) for n in (3, 11, 5, 0, 10, 11, 1)]
    results = await asyncio.gather(*calls, return_exceptions=True)
    assert all(isinstance(r, Conflict) for r in results if isinstance(r, BaseException))
    assert not isinstance(results[1], BaseException)
    shown = (await conversation.context()).summary
    assert shown is not None
    assert (shown.text, shown.through) == ("11", positions[11])


async def test_summary_of_an_unflushed_item_waits_for_its_flush(patient: Buffer) -> None:
    """It asks for the flush by itself: the flusher would come in a minute."""
    conversation = patient.conversation("c")
    positions = await fill(conversation, 0, 3)
    summary = await conversation.set_summary("early", through=positions[1])
    assert (await conversation.context()).summary == summary


async def test_summary_of_an_item_that_nobody_flushes_is_unavailable_in_time(settings: Settings) -> None:
    """Nothing was set; the same call is good later."""
    slow = settings.model_copy(update={"flush_interval_seconds": 60.0})
    async with Buffer.connect(slow) as buffer:
        conversation = buffer.conversation("c")
        async with Buffer.connect(slow, flusher=True):
            await on_path(buffer, "stream")
        (position,) = await fill(conversation, 0, 1)
        with pytest.raises(Unavailable, match=r"not in Postgres within 0\.3 s"):
            await conversation.set_summary("text", through=position, timeout=0.3)
        assert (await conversation.context()).summary is None
        async with Buffer.connect(slow, flusher=True):
            summary = await conversation.set_summary("text", through=position)
        assert (await conversation.context()).summary == summary


async def test_summary_in_direct_mode(settings: Settings) -> None:
    """Without Redis's stream, items are in Postgres at once, and so may their summary be."""
    async with Buffer.connect(settings) as buffer:
        conversation = buffer.conversation("c")
        positions = await fill(conversation, 0, 3)
        summary = await conversation.set_summary("direct", through=positions[2], timeout=1)
        assert (await conversation.context()).summary == summary


@pytest.mark.parametrize("flushed", [False, True])
async def test_through_must_be_the_position_of_an_item(patient: Buffer, flushed: bool) -> None:
    """Not of another conversation's, a removed one's, one before the first or after the last."""
    conversation = patient.conversation("c")
    others = (patient.conversation(f"other-{number}") for number in range(100))
    other = next(other for other in others if other._target.shard == conversation._target.shard)
    positions = await fill(conversation, 0, 4)
    (foreign,) = await fill(other, 0, 1)
    await conversation.append({}, replace_after="m-1", id="new")
    if flushed:
        await patient.flush()
    for position in (foreign, positions[3], positions[0] - 1, foreign + 1_000, 1):
        with pytest.raises(NotFound, match="through"):
            await conversation.set_summary("text", through=position, timeout=1)
    assert (await conversation.context()).summary is None


async def test_through_must_not_be_a_deleted_items(buffer: Buffer) -> None:
    """Nor the position that the deletion itself took, nor anything of an erased conversation."""
    conversation = buffer.conversation("c")
    positions = await fill(conversation, 0, 3)
    await conversation.delete_item("m-1")
    after = (await conversation.context()).last_position
    assert after is not None
    for position in (positions[1], after):
        with pytest.raises(NotFound):
            await conversation.set_summary("text", through=position)
        with pytest.raises(NotFound):  # as if it was deleted after the first look
            await buffer.runtime.summaries.set("default", "c", position, "text")
    await conversation.set_summary("text", through=positions[2])
    erased = await conversation.delete()
    assert (await conversation.context()).summary is None
    for position in (positions[2], erased.through):
        with pytest.raises(NotFound):
            await conversation.set_summary("text", through=position)


IMPOSSIBLE: list[tuple[Any, Any, type[InvalidRequest], str]] = [
    ("", 1, InvalidRequest, "text must not be empty"),
    (" \n", 1, InvalidRequest, "text must not be empty"),
    (b"text", 1, InvalidRequest, "text must be a string, not bytes"),
    ("a\x00b", 1, InvalidRequest, r"text holds U\+0000 or a lone surrogate"),
    ("a\ud800b", 1, InvalidRequest, r"text holds U\+0000 or a lone surrogate"),
    ("é" * 257, 1, TooLarge, r"text is 514 bytes; the limit is 512 \(summary_max_bytes\)"),
    *(
        ("text", through, InvalidRequest, "through must be")
        for through in (0, -5, 2**63, True, "1", None, 1.0)
    ),
]


async def test_impossible_summary_is_refused(settings: Settings) -> None:
    """The error names the field, and the limit."""
    async with Buffer.connect(settings.model_copy(update={"summary_max_bytes": 512})) as buffer:
        for text, through, error, says in IMPOSSIBLE:
            with pytest.raises(error, match=says) as caught:
                await buffer.conversation("c").set_summary(text, through=through)
            assert caught.value.param == says.split()[0]


async def test_longest_summary_is_kept_whole(settings: Settings) -> None:
    """Exactly at the limit, in bytes."""
    small = settings.model_copy(update={"summary_max_bytes": 512})
    async with Buffer.connect(small) as buffer:
        conversation = buffer.conversation("c")
        (position,) = await fill(conversation, 0, 1)
        await conversation.set_summary("é" * 256, through=position)
        context = await conversation.context()
        assert context.summary is not None
        assert context.summary.text == "é" * 256


async def test_without_postgres_a_summary_is_unavailable(own_settings: Settings, own_servers: Any) -> None:
    """Appends go on; the summary is to be set again later."""
    quick = own_settings.model_copy(update={"postgres_timeout_seconds": 2.0})
    async with Buffer.connect(quick, flusher=True) as buffer:
        conversation = buffer.conversation("c")
        (position,) = await fill(conversation, 0, 1)
        await buffer.flush()
        await own_servers.postgres.stop()
        with pytest.raises(Unavailable):
            await conversation.set_summary("text", through=position, timeout=1)
        await own_servers.postgres.start()

        async def is_set() -> bool:
            try:
                return bool(await conversation.set_summary("text", through=position))
            except Unavailable:
                return False

        await eventually(is_set)
