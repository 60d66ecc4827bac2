"""Import and export against a real Postgres: what goes in comes back, in its order."""
# Fixtures are imported, and named again where they are asked for.
# ruff: noqa: F401, F811

from __future__ import annotations

import asyncio
import json
import time
import uuid
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given
from hypothesis import settings as given_settings
from hypothesis import strategies as st

from buffer.model.ids import derive_item_id
from buffer.model.position import pack
from buffer.store import removals
from buffer.store.items import NewConversation, Row, add_conversations, copy_rows
from buffer.store.pool import Database
from buffer.store.removals import Cut
from buffer.transfer import export, import_file
from tests.integration.transfer_support import (
    NOON,
    append_live,
    conversation,
    counts,
    database,
    exported,
    lines_of,
    problems,
    rows_of,
    settings,
    tenant,
    turn,
)

TRANSCRIPTS = Path(__file__).parents[3] / "shared" / "data" / "transcripts.jsonl"
NOON_POSITION = int(NOON.timestamp()) << 9


# --- there and back


@pytest.mark.skipif(not TRANSCRIPTS.exists(), reason="the transcripts are not a part of this project")
async def test_export_gives_back_the_imported_transcripts(database, tenant):
    """1,000 real conversations come back with their items, order and metadata; a repeat stores nothing."""
    lines = TRANSCRIPTS.read_bytes().splitlines()
    wanted = {line["conversation_id"]: line for line in map(json.loads, lines)}
    first = await import_file(database, lines, tenant=tenant)
    assert counts(first) == (12_130, 0, 0, 0)
    assert first.ok
    back = await exported(database, tenant)
    assert [line["conversation_id"] for line in back] == sorted(wanted)
    for line in back:
        assert line["items"] == wanted[line["conversation_id"]]["items"]
        assert line["metadata"] == wanted[line["conversation_id"]]["metadata"]
    assert counts(await import_file(database, lines, tenant=tenant)) == (0, 12_130, 0, 0)


odd_text = st.text(st.characters(exclude_categories=()), max_size=20).map(
    # Two halves side by side are one character in JSON.
    lambda text: text.encode("utf-16", "surrogatepass").decode("utf-16", "surrogatepass")
) | st.sampled_from(["\u0000", "\ud800", "a\udfff", "\u2028\n\r", "😀", '"id":', "\\u0000"])
odd_values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**80), 2**80)
    | st.floats(allow_nan=False, allow_infinity=False)
    | odd_text,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(odd_text, inner, max_size=3),
    max_leaves=8,
)
some_ids = st.text(
    st.characters(exclude_categories=("Cc", "Cs"), exclude_characters="/"), min_size=1, max_size=40
).filter(lambda value: value not in {".", ".."})
some_times = (
    st.integers(0, 2**31 - 1)
    | st.floats(0, 2**31 - 1)
    | st.floats(0, 2**31 - 1).map(lambda seconds: datetime.fromtimestamp(seconds, UTC).isoformat())
    | st.integers(0, 2**31 - 1).map(lambda seconds: time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(seconds)))
)
odd_items = st.builds(
    lambda body, own: body | own,
    st.dictionaries(odd_text.filter(lambda key: key not in {"id", "created_at"}), odd_values, max_size=4),
    st.fixed_dictionaries({}, optional={"id": st.none() | some_ids, "created_at": st.none() | some_times}),
)
odd_conversations = st.fixed_dictionaries(
    {
        "conversation_id": some_ids,
        "items": st.lists(odd_items, max_size=5, unique_by=lambda item: item.get("id") or object()),
    },
    optional={
        "metadata": st.none() | st.dictionaries(odd_text, odd_values, max_size=2),
        "user": st.none() | some_ids,
        "created_at": some_times,
    },
)


@given_settings(deadline=None, max_examples=60, suppress_health_check=list(HealthCheck))
@given(st.lists(odd_conversations, max_size=4, unique_by=lambda line: line["conversation_id"]), st.booleans())
async def test_what_is_accepted_comes_back_equal_whatever_it_holds(database, conversations, ascii_only):
    """NUL, lone surrogates, big integers, nesting and any id survive import, export and import again."""
    tenant, other = f"t-{uuid.uuid4().hex}", f"t-{uuid.uuid4().hex}"
    lines = [
        json.dumps(line, ensure_ascii=ascii_only).encode("utf-8", "surrogatepass") for line in conversations
    ]
    report = await import_file(database, lines, tenant=tenant)
    assert report.ok, report.problems
    wanted = {line["conversation_id"]: line for line in map(json.loads, lines)}
    back = await exported(database, tenant)
    assert {line["conversation_id"]: line["items"] for line in back} == {
        key: line["items"] for key, line in wanted.items()
    }
    assert all(line["metadata"] == (wanted[line["conversation_id"]].get("metadata") or {}) for line in back)
    again = await import_file(database, lines, tenant=tenant)
    assert (again.stored, again.ok) == (0, True)

    moved = await import_file(database, lines_of(*(line | {"tenant": other} for line in back)))
    assert moved.ok, moved.problems
    assert [line | {"tenant": tenant} for line in await exported(database, other)] == back
    for key in wanted:
        before, after = await rows_of(database, tenant, key), await rows_of(database, other, key)
        assert [(r["item_id"], r["data"], r["created_at"]) for r in before] == [
            (r["item_id"], r["data"], r["created_at"]) for r in after
        ]


async def test_an_export_of_appended_items_loses_nothing(database, tenant):
    """Ids, bodies, times and order of appended items survive the way to another database and back home."""
    bodies = [
        ("msg_1", turn("id beside")),
        ("msg_2", turn("id inside", id="msg_2")),
        ("msg_3", turn("null", id=None)),
        ("msg_4", {}),
        (derive_item_id("c1", 4), turn("derived")),
        ("msg_6", turn("time", created_at="yesterday")),
        ("msg_7", turn("time", created_at=1_700_000_000_000)),
        ("msg_8", turn("removed")),
        (derive_item_id("c1", 8), turn("derived for another place")),
    ]
    times = [NOON + timedelta(seconds=n, microseconds=n * 1_001) for n in range(len(bodies))]
    await append_live(database, tenant, bodies, user="u/ü".replace("/", ""), times=times)
    async with database.transaction() as connection:
        await removals.remove(connection, [Cut(tenant, "c1", pack(1, 8), pack(1, 6), pack(1, 8), None)])

    (line,) = await exported(database, tenant)
    assert [item.get("id") for item in line["items"]] == [
        "msg_1", "msg_2", "msg_3", "msg_4", None, "msg_6", "msg_7", derive_item_id("c1", 8)
    ]  # fmt: skip
    at_home = await import_file(database, lines_of(line))
    assert (counts(at_home), at_home.ok) == ((0, 8, 0, 0), True)

    moved = await import_file(database, lines_of(line | {"tenant": f"{tenant}-2"}))
    assert counts(moved) == (8, 0, 0, 0)
    before = [row for row in await rows_of(database, tenant) if row["data"] is not None]
    after = await rows_of(database, f"{tenant}-2")
    assert [row["item_id"] for row in after] == [row["item_id"] for row in before]
    assert [json.loads(row["data"]) for row in after] == [json.loads(row["data"]) for row in before]
    assert [row["created_at"] for row in after] == [row["created_at"] for row in before]
    assert await exported(database, f"{tenant}-2") == [line | {"tenant": f"{tenant}-2"}]


async def test_times_of_appended_items_survive_without_a_word_in_the_items(database, tenant):
    """Where items don't say when they were created, the line does, to the microsecond."""
    times = [NOON + timedelta(microseconds=n * 1_234_567) for n in range(3)]
    await append_live(database, tenant, [(derive_item_id("c1", n), turn("x")) for n in range(3)], times=times)
    (line,) = await exported(database, tenant)
    assert line["items"] == [turn("x")] * 3
    assert (await import_file(database, lines_of(line | {"tenant": f"{tenant}-2"}))).stored == 3
    assert [row["created_at"] for row in await rows_of(database, f"{tenant}-2")] == times


async def test_json_of_several_lines_is_exported_in_one(database, tenant):
    """White space that somebody else has put into a row does not break the line."""
    async with database.transaction() as connection:
        data = '\n{\r\n  "a": "\\n",\n  "b": []\n}'
        await copy_rows(
            connection, [Row(tenant, "c1", 1, "i1", NOON, data), Row(tenant, "c1", 2, "i2", NOON, "{ }")]
        )
        await add_conversations(connection, [NewConversation(tenant, "c1", None, NOON, NOON)])
    (line,) = await exported(database, tenant)
    assert line["items"] == [{"id": "i1", "a": "\n", "b": []}, {"id": "i2"}]


async def test_export_selects_by_tenant_and_user_in_order(database, tenant):
    """Conversations come by tenant and id, only those asked for, empty ones included."""
    await import_file(
        database,
        lines_of(
            conversation(turn("1"), named="b", user="u1", tenant=f"{tenant}-a"),
            conversation(turn("2"), named="a", user="u2", tenant=f"{tenant}-a", metadata={"k": "v"}),
            conversation(named="B", tenant=f"{tenant}-a"),
            conversation(turn("4"), named="a", user="u1", tenant=f"{tenant}-b"),
        ),
    )

    def keys(lines):
        return [
            (line["tenant"][-1], line["conversation_id"])
            for line in lines
            if line["tenant"].startswith(tenant)
        ]

    assert keys(await exported(database, f"{tenant}-a")) == [("a", "B"), ("a", "a"), ("a", "b")]
    assert keys(await exported(database, None, user="u1")) == [("a", "b"), ("b", "a")]
    everything = [
        line for line in await exported(database, None) if line.get("tenant", "").startswith(tenant)
    ]
    assert keys(everything) == [("a", "B"), ("a", "a"), ("a", "b"), ("b", "a")]
    assert [line.get("user") for line in everything] == [None, "u2", "u1", "u1"]
    assert [line["metadata"] for line in everything] == [{}, {"k": "v"}, {}, {}]


async def test_a_line_without_a_tenant_belongs_to_the_default_one(database):
    """Neither side needs to name the tenant `default`."""
    name = uuid.uuid4().hex
    assert (await import_file(database, lines_of(conversation(turn("x"), named=name)))).stored == 1
    (line,) = [line for line in await exported(database, "default") if line["conversation_id"] == name]
    assert "tenant" not in line


async def test_long_conversations_are_exported_in_pieces(database, tenant):
    """A conversation longer than one query's share comes whole and in order, beside short ones, in pieces."""
    sizes = {"a": 3, "b": 500, "c": 1_203, "d": 0, "e": 501, "f": 2, "g": 700}
    await import_file(
        database,
        lines_of(
            *(
                conversation(*(turn("x" * 300, n=n) for n in range(size)), named=name)
                for name, size in sizes.items()
            )
        ),
        tenant=tenant,
    )
    pieces = []
    await export(database, pieces.append, tenant=tenant)
    lines = [json.loads(line) for line in b"".join(pieces).splitlines()]
    assert {line["conversation_id"]: [item["n"] for item in line["items"]] for line in lines} == {
        name: list(range(size)) for name, size in sizes.items()
    }
    assert len(pieces) > 5
    assert max(map(len, pieces)) < 2 * 64 * 1024


async def test_an_export_is_one_state_of_the_database(settings, database, tenant):
    """What is stored while an export runs is in none of its lines."""
    await import_file(
        database,
        lines_of(*(conversation(turn("x" * 3_000), named=f"c{n:03}") for n in range(200))),
        tenant=tenant,
    )
    late = lines_of(
        conversation(turn("late", id="late"), named="c199"), conversation(turn("late"), named="c2")
    )

    async def store_late():
        other = Database(settings, "test-late")
        await other.open()
        report = await import_file(other, late, tenant=tenant)
        await other.close()
        return report.stored

    out = []

    def write(piece):
        if not out:
            with ThreadPoolExecutor() as pool:
                assert pool.submit(asyncio.run, store_late()).result() == 2
        out.append(piece)

    report = await export(database, write, tenant=tenant)
    assert (report.conversations, report.items) == (200, 200)
    assert b"late" not in b"".join(out)


async def test_a_broken_pipe_is_not_taken_for_a_broken_database(database, tenant):
    """An error of the caller's `write` arrives unchanged."""

    def write(_):
        raise BrokenPipeError("gone")

    await import_file(database, lines_of(conversation(turn("x"))), tenant=tenant)
    with pytest.raises(BrokenPipeError, match="gone"):
        await export(database, write, tenant=tenant)


# --- order


async def test_created_at_sets_the_position(database, tenant):
    """A position is the second of its item's time shifted by 9 bits, and always after the item before it."""
    items = [
        turn("noon", created_at=NOON.timestamp()),
        turn("same second", created_at=NOON.timestamp() + 0.9),
        turn("no time"),
        turn("clock went back", created_at=(NOON - timedelta(days=1)).isoformat()),
        turn("later", created_at="2024-05-01T14:00:10+02:00"),
    ]
    await import_file(database, lines_of(conversation(*items)), tenant=tenant)
    rows = await rows_of(database, tenant)
    later = NOON_POSITION + (10 << 9)
    assert [row["position"] for row in rows] == [*range(NOON_POSITION, NOON_POSITION + 4), later]
    assert rows[2]["created_at"] == NOON + timedelta(seconds=0.9)
    assert rows[3]["created_at"] == NOON - timedelta(days=1)
    assert [json.loads(row["data"]) for row in rows] == items


async def test_imported_items_come_before_everything_appended(database, tenant):
    """History that is imported later still reads before what was appended, however late its times are."""
    await append_live(database, tenant, [("live", turn("live"))], times=[NOON])
    latest = turn("latest", created_at="2038-01-19T03:14:07Z")
    report = await import_file(
        database, lines_of(conversation(turn("untimed"), latest, created_at=5)), tenant=tenant
    )
    assert report.stored == 2
    (line,) = await exported(database, tenant)
    assert [item["content"] for item in line["items"]] == ["untimed", "latest", "live"]
    assert line["created_at"] == 5


async def test_files_imported_in_any_order_read_in_the_order_of_their_times(database, tenant):
    """A later import of older items goes before the newer ones; one without times goes last."""
    for name, created_at in (
        ("newer", NOON),
        ("older", NOON - timedelta(days=9)),
        ("between", NOON - timedelta(days=1)),
    ):
        items = [turn(f"{name} {n}", id=f"{name}-{n}", created_at=created_at.timestamp()) for n in range(3)]
        await import_file(database, lines_of(conversation(*items)), tenant=tenant)
    await import_file(database, lines_of(conversation(turn("untimed", id="untimed"))), tenant=tenant)
    (line,) = await exported(database, tenant)
    wanted = [f"{name} {n}" for name in ("older", "between", "newer") for n in range(3)]
    assert [item["content"] for item in line["items"]] == [*wanted, "untimed"]


@pytest.mark.parametrize("taken", [3, 2_000, 4_100])
async def test_a_taken_position_gives_way_to_the_next_free_one(database, tenant, taken):
    """Items of the same second follow those that were imported before, over any number of taken positions."""
    first = [turn("first", id=f"1-{n}", created_at=NOON.timestamp()) for n in range(taken)]
    second = [turn("second", id=f"2-{n}", created_at=NOON.timestamp()) for n in range(3)]
    after = turn("after", id="3", created_at=NOON.timestamp() + 3_600)
    await import_file(database, lines_of(conversation(*first, after)), tenant=tenant)
    report = await import_file(database, lines_of(conversation(*second)), tenant=tenant)
    assert counts(report) == (3, 0, 0, 0)
    rows = await rows_of(database, tenant)
    wanted = [*(f"1-{n}" for n in range(taken)), "2-0", "2-1", "2-2", "3"]
    assert [row["item_id"] for row in rows] == wanted
    assert [row["position"] for row in rows[:-1]] == list(range(NOON_POSITION, NOON_POSITION + taken + 3))


async def test_gaps_between_taken_positions_are_used_in_order(database, tenant):
    """Positions stay strictly increasing in the file's order when only some are free."""
    start = NOON.timestamp()
    old = [turn("old", id=f"old-{n}", created_at=start + n) for n in range(4)]
    new = [turn("new", id=f"new-{n}", created_at=start + n) for n in range(4)]
    await import_file(database, lines_of(conversation(*old)), tenant=tenant)
    await import_file(database, lines_of(conversation(*new)), tenant=tenant)
    rows = await rows_of(database, tenant)
    assert [row["item_id"] for row in rows] == [f"{kind}-{n}" for n in range(4) for kind in ("old", "new")]


async def test_a_file_that_has_grown_adds_only_what_is_new_behind_the_rest(database, tenant):
    """Items added at the end of a line follow the known ones, not what other files brought."""
    known = [turn(str(n)) for n in range(3)]
    await import_file(database, lines_of(conversation(*known)), tenant=tenant)
    others = conversation(turn("other", id="other", created_at=NOON.timestamp()))
    await import_file(database, lines_of(others), tenant=tenant)
    report = await import_file(database, lines_of(conversation(*known, turn("3"), turn("4"))), tenant=tenant)
    assert counts(report) == (2, 3, 0, 0)
    assert [row["position"] for row in await rows_of(database, tenant)] == [1, 2, 3, 4, 5, NOON_POSITION]


async def test_positions_run_out_at_the_end_of_epoch_zero(database, tenant):
    """Items that would need a position of the live epochs are refused one by one, never stored among them."""
    last = "2038-01-19T03:14:07Z"
    items = [turn(str(n), created_at=last) for n in range(514)]
    report = await import_file(database, lines_of(conversation(*items)), tenant=tenant)
    assert problems(report) == [(1, "conflict", "items[512]"), (1, "conflict", "items[513]")]
    assert report.stored == 512
    assert (await rows_of(database, tenant))[-1]["position"] == pack(1, 0) - 1
