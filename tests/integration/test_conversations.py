"""Conversations: made, described, and listed by user, newest activity first."""

from __future__ import annotations

import asyncio
import re
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from datetime import UTC, datetime, timedelta

import asyncpg
import pytest

from buffer import Buffer, Conflict, InvalidRequest, NotFound, Settings, TooLarge, Unavailable
from buffer.app.runtime import open_database
from buffer.embedded import EmbeddedServers
from buffer.store import queries
from buffer.store.placing import Placed, place
from buffer.transfer import import_file
from tests.support.paths import on_path

LONG_LIST = 100_000


@pytest.fixture(params=["tail", "flushed", "direct"])
async def anywhere(request: pytest.FixtureRequest, settings: Settings) -> AsyncIterator[Buffer]:
    """A buffer whose appends stay in the tail, are flushed at once, or go to Postgres directly."""
    interval = 0.01 if request.param == "flushed" else 60.0
    async with AsyncExitStack() as stack:
        direct = request.param == "direct"
        changed = settings.model_copy(update={"flush_interval_seconds": interval})
        buffer = await stack.enter_async_context(Buffer.connect(changed, flusher=not direct))
        await on_path(buffer, "direct" if direct else "stream")
        yield buffer


# --- one conversation


async def test_created_conversation_is_there_with_its_user_and_metadata(anywhere: Buffer) -> None:
    """Before anything is appended, and afterwards; its time is that of its creation."""
    conversation = anywhere.conversation("c", user="u")
    before = datetime.now(UTC) - timedelta(seconds=1)
    made = await conversation.create({"plan": "gold"})
    assert (made.id, made.user, made.metadata) == ("c", "u", {"plan": "gold"})
    assert before < made.created_at < datetime.now(UTC) + timedelta(seconds=1)
    assert await conversation.info() == made
    assert not (await conversation.items()).items
    await conversation.append({}, id="m-1")
    await anywhere.flush()
    info = await conversation.info()
    assert (info.created_at, info.metadata) == (made.created_at, {"plan": "gold"})
    assert info.active_at > made.active_at


async def test_conversation_that_exists_is_a_conflict(anywhere: Buffer) -> None:
    """Created, or only appended to, flushed or not; another tenant's is no matter."""
    await anywhere.conversation("made").create()
    await anywhere.conversation("appended").append({})
    for name in ("made", "appended"):
        with pytest.raises(Conflict, match=name) as caught:
            await anywhere.conversation(name).create({"a": "b"})
        assert caught.value.ids == [name]
        assert (await anywhere.conversation(name).info()).metadata == {}
        await anywhere.conversation(name, tenant="them").create()


async def test_of_concurrent_creations_one_succeeds(anywhere: Buffer) -> None:
    """The others are conflicts, and what the one set is what stays."""
    tries = [anywhere.conversation("c").create({"by": str(n)}) for n in range(8)]
    answers = await asyncio.gather(*tries, return_exceptions=True)
    (made,) = [answer for answer in answers if not isinstance(answer, Exception)]
    assert sum(isinstance(answer, Conflict) for answer in answers) == 7
    assert await anywhere.conversation("c").info() == made


async def test_appended_conversation_is_described_by_its_items(anywhere: Buffer) -> None:
    """By the time of the first one, and the first user that was named; flushed it says the same."""
    await anywhere.conversation("c").append({}, id="m-1")
    await anywhere.conversation("c", user="u").append({}, id="m-2")
    items = (await anywhere.conversation("c").items()).items
    for _ in range(2):
        info = await anywhere.conversation("c").info()
        assert (info.id, info.user, info.metadata) == ("c", "u", {})
        assert (info.created_at, info.active_at) == (items[0].created_at, items[-1].created_at)
        await anywhere.flush()


async def test_conversation_that_nobody_made_is_not_found(anywhere: Buffer) -> None:
    """Nor can it be described; and so it is after its erasure, until it begins anew."""
    conversation = anywhere.conversation("c", user="u")
    for _ in range(2):
        with pytest.raises(NotFound):
            await conversation.info()
        with pytest.raises(NotFound):
            await conversation.set_metadata({})
        await conversation.append({"n": 1})
        await conversation.set_metadata({"a": "b"})
        await conversation.delete()
    assert (await conversation.create()).metadata == {}


async def test_metadata_is_replaced_as_a_whole(anywhere: Buffer) -> None:
    """Flushed or not; None and ``{}`` leave none; items, user and time stay."""
    conversation = anywhere.conversation("c", user="u")
    await conversation.append({}, id="m-1")
    first = await conversation.info()
    for metadata in ({"a": "1", "b": "\x00é"}, {"b": "3"}, None, {"c": ""}, {}):
        described = await conversation.set_metadata(metadata)
        assert described == await conversation.info()
        assert described.metadata == (metadata or {})
        assert (described.user, described.created_at) == (first.user, first.created_at)
    await anywhere.flush()
    await conversation.set_metadata({"d": "4"})
    await conversation.append({}, id="m-2")
    await anywhere.flush()
    assert (await conversation.info()).metadata == {"d": "4"}
    assert [item.id for item in (await conversation.items()).items] == ["m-1", "m-2"]
    with pytest.raises(TooLarge, match=r"metadata\.a .* 512"):
        await conversation.set_metadata({"a": "x" * 513})
    with pytest.raises(TooLarge, match=r"metadata\.a .* 512"):
        await anywhere.conversation("new").create({"a": "x" * 513})


async def test_erasure_that_overtakes_a_description_wins(patient: Buffer) -> None:
    """Described by items that are erased before the row is made, it does not come back."""
    conversation = patient.conversation("c", user="u")
    await conversation.append({})
    store = patient.runtime.directory._store
    describe, erased = store.describe, False

    async def late(*args: object) -> object:
        nonlocal erased
        if not erased:
            erased = True
            await conversation.delete()
        return await describe(*args)

    store.describe = late
    with pytest.raises(NotFound):
        await conversation.set_metadata({"a": "b"})
    assert erased
    assert (await patient.conversations("u")).conversations == []


async def test_directory_without_postgres_is_unavailable(
    own_servers: EmbeddedServers, own_settings: Settings
) -> None:
    """Not found, or an empty list, would be a lie."""
    async with Buffer.connect(own_settings, flusher=True) as buffer:
        conversation = buffer.conversation("c", user="u")
        await conversation.append({}, id="m-1")
        await own_servers.postgres.stop()
        for call in (
            buffer.conversation("new").create(),
            conversation.info(),
            conversation.set_metadata({}),
            conversation.item("m-1"),
            buffer.conversations("u"),
        ):
            with pytest.raises(Unavailable):
                await call
        await own_servers.postgres.restart()


async def test_conversation_that_may_be_with_a_missing_process_is_unavailable(
    anywhere: Buffer, postgres: asyncpg.Connection
) -> None:
    """Neither not found nor free to be made."""
    await postgres.execute("insert into buffer.missing select shard, 'gone' from buffer.shards")
    conversation = anywhere.conversation("c")
    for call in (conversation.info(), conversation.create(), conversation.set_metadata({})):
        with pytest.raises(Unavailable):
            await call
    await postgres.execute("delete from buffer.missing")
    await conversation.create()


# --- lists


async def _ids(buffer: Buffer, user: str, **how: object) -> list[str]:
    return [info.id for info in (await buffer.conversations(user, **how)).conversations]


async def test_list_is_newest_activity_first(anywhere: Buffer) -> None:
    """An append moves its conversation to the front, whoever names the user; other users' stay out."""
    for name in ("a", "b", "c"):
        await anywhere.conversation(name, user="u").append({"n": 1})
        await asyncio.sleep(0.002)  # times are milliseconds
    await anywhere.conversation("x", user="other").append({"n": 1})
    await anywhere.conversation("nobody").append({"n": 1})
    await anywhere.flush()
    assert await _ids(anywhere, "u") == ["c", "b", "a"]
    await anywhere.conversation("a").append({"n": 2})
    await anywhere.flush()
    assert await _ids(anywhere, "u") == ["a", "c", "b"]
    await asyncio.sleep(0.002)
    await anywhere.conversation("b", user="u").append({"n": 2})
    await anywhere.flush()
    assert await _ids(anywhere, "u") == ["b", "a", "c"]
    assert await _ids(anywhere, "other") == ["x"]
    assert await _ids(anywhere, "u", tenant="them") == []
    assert await _ids(anywhere, "nobody") == []


async def test_list_moves_under_another_flusher_too(settings: Settings) -> None:
    """A flusher that never saw the user of a conversation moves it all the same."""
    async with Buffer.connect(settings, flusher=True) as first:
        for name in ("a", "b"):
            await first.conversation(name, user="u").append({"n": 1})
            await first.flush()
    async with Buffer.connect(settings, flusher=True) as second:
        await on_path(second, "stream")
        for number in range(2, 4):
            await second.conversation("a").append({"n": number})
            await second.flush()
            assert await _ids(second, "u") == ["a", "b"]
            await second.conversation("b").append({"n": number})
            await second.flush()
            assert await _ids(second, "u") == ["b", "a"]


async def test_what_a_spill_brings_moves_the_list_to_its_last_item(patient: Buffer) -> None:
    """Several items of a conversation placed in one statement, whichever of them comes first."""
    times = [datetime(2026, 1, day, tzinfo=UTC) for day in (2, 4, 3)]
    rows = [
        Placed("default", "c", position, f"m-{position}", at, b"{}", None, "u")
        for position, at in enumerate(times, start=1)
    ]
    async with patient.runtime.database.transaction() as connection:
        await place(connection, rows)
    info = await patient.conversation("c").info()
    assert (info.created_at, info.active_at) == (times[0], times[1])


async def test_conversation_joins_the_list_with_its_user(anywhere: Buffer) -> None:
    """Appended to without a user at first; created without any item."""
    await anywhere.conversation("late").append({"n": 1})
    await anywhere.flush()
    assert await _ids(anywhere, "u") == []
    await anywhere.conversation("empty", user="u").create()
    await asyncio.sleep(0.002)
    await anywhere.conversation("late", user="u").append({"n": 2})
    await anywhere.flush()
    assert await _ids(anywhere, "u") == ["late", "empty"]


async def test_pages_of_a_list_show_every_conversation_once(
    patient: Buffer, postgres: asyncpg.Connection
) -> None:
    """With every limit, also where many were active at the same time; the cursor is a conversation's id."""
    await postgres.execute(
        "insert into buffer.conversations (tenant, conversation, user_id, created_at, active_at)"
        " select 'default', 'c' || n, 'u', now(), timestamptz '2026-01-01' + n % 3 * interval '1 s'"
        " from generate_series(1, 30) as n"
    )
    everything = await _ids(patient, "u", limit=100)
    expected = sorted((f"c{n}" for n in range(1, 31)), key=lambda c: (int(c[1:]) % 3, c.encode()))
    assert everything == expected[::-1]
    for limit in (1, 2, 7, 29, 30, 31):
        seen: list[str] = []
        page = await patient.conversations("u", limit=limit)
        while True:
            seen += [info.id for info in page.conversations]
            if not page.has_more:
                break
            page = await patient.conversations("u", limit=limit, after=page.last_id)
        assert seen == everything
    assert (page.first_id, page.last_id) == (everything[0], everything[-1])


@pytest.mark.parametrize(
    ("how", "error"),
    [
        ({"limit": 0}, InvalidRequest),
        ({"limit": 1_001}, InvalidRequest),
        ({"after": "nobody's"}, NotFound),
        ({"after": "theirs"}, NotFound),
        ({"after": "a/b"}, InvalidRequest),
    ],
)
async def test_impossible_list_is_refused(patient: Buffer, how: dict[str, object], error: type) -> None:
    """A cursor is one of the user's own conversations."""
    await patient.conversation("theirs", user="them").create()
    with pytest.raises(error):
        await patient.conversations("u", **how)
    with pytest.raises(InvalidRequest, match="user"):
        await patient.conversations("")


async def test_imported_conversation_is_as_old_as_its_last_item(settings: Settings) -> None:
    """An import does not make old conversations new, nor a newer one old."""
    async with Buffer.connect(settings, flusher=True) as buffer:
        await buffer.conversation("live", user="u").append({"n": 1})
        await buffer.flush()
        live = await buffer.conversation("live").info()
        lines = [
            '{"conversation_id": "old", "user": "u", "items": [{"id": "m-1", "created_at": 1700000100}]}',
            '{"conversation_id": "live", "user": "u", "items": [{"id": "m-1", "created_at": 1600000000}]}',
            '{"conversation_id": "empty", "user": "u", "items": [], "created_at": 1650000000}',
        ]
        async with open_database(settings) as database:
            for _ in range(2):
                report = await import_file(database, lines, settings=settings)
                assert report.ok
        assert await _ids(buffer, "u") == ["live", "old", "empty"]
        times = [info.active_at for info in (await buffer.conversations("u")).conversations]
        assert times == [live.active_at, *(datetime.fromtimestamp(t, UTC) for t in (1700000100, 1650000000))]


async def test_list_of_a_user_with_100_000_conversations_reads_its_page_only(
    patient: Buffer, postgres: asyncpg.Connection
) -> None:
    """Each page is a range of the index, as long as the page, at the front and far behind."""
    await postgres.execute(
        "insert into buffer.conversations (tenant, conversation, user_id, created_at, active_at)"
        " select 'default', 'c' || n, 'u', now(), timestamptz '2026-01-01' + n / 10 * interval '1 s'"
        f" from generate_series(1, {LONG_LIST}) as n"
    )
    await postgres.execute("analyze buffer.conversations")
    page = await patient.conversations("u")
    assert page.first_id == "c100000"
    far = await postgres.fetchrow("select * from buffer.conversations where conversation = 'c30000'")
    for cursor in ((None, None), (far["active_at"], far["conversation"])):
        query = "explain (analyze, costs off, timing off) " + queries.load("conversations")["of_user"]
        plan = "\n".join(r[0] for r in await postgres.fetch(query, "default", "u", 21, *cursor))
        assert "Index Scan Backward using conversations_activity" in plan
        assert "ROW(active_at, conversation) < ROW(" in plan
        assert not re.search("Filter|Sort|Seq Scan", plan), plan
        scanned = re.search(r"Index Scan.*actual rows=([0-9.]+)", plan)
        assert scanned is not None
        assert float(scanned[1]) == 21
