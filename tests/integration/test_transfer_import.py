"""Import against a real Postgres: what it refuses, how it is cut into transactions, and what disturbs it."""
# Fixtures are imported, and named again where they are asked for.
# ruff: noqa: F401, F811

from __future__ import annotations

import asyncio
import json
import sys
from collections import Counter, defaultdict
from datetime import timedelta

import asyncpg
import pytest

from buffer.model.codec import encode_item
from buffer.model.position import pack
from buffer.store import removals
from buffer.store.items import Row, copy_rows
from buffer.store.removals import Cut, Erasure
from buffer.transfer import ImportReport, import_file
from tests.integration.transfer_support import (
    NOON,
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

# --- what is refused


@pytest.mark.parametrize(
    ("line", "param", "words"),
    [
        (b"{", None, "not JSON"),
        (b'{"conversation_id": "\xff"}', None, "not JSON"),
        (b"[" * 100_000, None, "not JSON"),
        (b"[1]", None, "must be a JSON object"),
        (conversation(turn("x"), named=7), "conversation_id", "must be a string"),
        (conversation(turn("x"), named="a/b"), "conversation_id", "'/'"),
        (conversation(turn("x"), named="c" * 201), "conversation_id", "limit is 200"),
        ({"conversation_id": "bad"}, "items", "must be a list"),
        (conversation("x", named="bad"), "items[0]", "must be a JSON object"),
        (conversation(turn("x"), turn("x", id=""), named="bad"), "items[1].id", "must not be empty"),
        (conversation(turn("x" * (1 << 20)), named="bad"), "items[0]", "limit is 1048576 (max_item_bytes)"),
        (b'{"conversation_id": "bad", "items": [{"a": NaN}]}', "items[0].a", "nan"),
        (
            conversation(json.loads('{"a":' * 101 + "1" + "}" * 101), named="bad"),
            "items[0]",
            "more than 100 levels",
        ),
        (conversation(turn("x", created_at=2**31), named="bad"), "items[0].created_at", "2038"),
        (conversation(turn("x", created_at=-1), named="bad"), "items[0].created_at", "limits are 0"),
        (conversation(turn("x", created_at=1_700_000_000_000), named="bad"), "items[0].created_at", "2038"),
        (conversation(turn("x", created_at=1e300), named="bad"), "items[0].created_at", "2038"),
        (conversation(turn("x", created_at="yesterday"), named="bad"), "items[0].created_at", "not ISO 8601"),
        (
            conversation(turn("x", created_at="0001-01-01T00:00:00+14:00"), named="bad"),
            "items[0].created_at",
            "2038",
        ),
        (conversation(turn("x", created_at=True), named="bad"), "items[0].created_at", "not bool"),
        (conversation(turn("x"), named="bad", created_at=[]), "created_at", "not list"),
        (conversation(turn("x"), named="bad", metadata=[1]), "metadata", "must be a JSON object"),
        (
            conversation(turn("x"), named="bad", metadata={"a": "x" * (1 << 20)}),
            "metadata",
            "limit is 1048576",
        ),
        (conversation(turn("x"), named="bad", user=5), "user", "must be a string"),
        (conversation(turn("x"), named="bad", tenant="another"), "tenant", "alone"),
        (conversation(turn("x"), named="bad", item_times=[]), "item_times", "a list of 1"),
        (conversation(turn("x"), named="bad", added_ids=[0]), "added_ids", "that have an id"),
    ],
)
async def test_a_bad_line_is_reported_and_the_rest_goes_on(database, tenant, line, param, words):
    """The report names line, field and limit; nothing of the line is stored, the lines around it are."""
    raw = line if isinstance(line, bytes) else json.dumps(line).encode()
    good = [conversation(turn("x"), named="before"), conversation(turn("x"), named="after")]
    report = await import_file(
        database, [lines_of(good[0])[0], b"\n", raw, *lines_of(good[1])], tenant=tenant
    )
    assert problems(report) == [(3, "rejected", param)]
    assert words in report.problems[0].message
    assert not report.ok
    assert counts(report) == (2, 0, 0, 1)
    assert [line["conversation_id"] for line in await exported(database, tenant)] == ["after", "before"]


async def test_an_item_of_exactly_the_limit_is_taken(database, tenant):
    """1 MiB of JSON is stored; the tests of bad lines hold one byte more and beyond."""
    room = (1 << 20) - len(encode_item(turn(""), "item", 1 << 20))
    for text, rejected in (("x" * room, 0), ("x" * (room + 1), 1)):
        report = await import_file(
            database, lines_of(conversation(turn(text), named=f"c{rejected}")), tenant=tenant
        )
        assert report.rejected == rejected


async def test_another_body_is_a_conflict_and_overwrites_nothing(database, tenant):
    """What differs from what is stored is reported with line and field and left out; the rest is stored."""
    stored = conversation(turn("a", id="i1"), turn("b"), metadata={"k": 1, "l": 2}, user="u1")
    await import_file(database, lines_of(stored), tenant=tenant)
    before = await exported(database, tenant)
    same = [
        {"content": "a", "id": "i1", "role": "user"},  # other order of keys
        turn("b"),
    ]
    again = await import_file(
        database, lines_of(stored | {"items": same, "metadata": {"l": 2, "k": 1}}), tenant=tenant
    )
    assert (counts(again), again.ok) == ((0, 2, 0, 0), True)

    others = conversation(turn("A", id="i1"), turn("B"), turn("new"), metadata={"k": 2}, user="u2")
    report = await import_file(database, [b"", *lines_of(others)], tenant=tenant)
    params = ["user", "metadata", "items[0]", "items[1]"]
    assert problems(report) == [(2, "conflict", param) for param in params]
    assert counts(report) == (1, 0, 4, 0)
    after = await exported(database, tenant)
    assert after[0]["items"] == [*before[0]["items"], turn("new")]
    assert (after[0]["user"], after[0]["metadata"]) == ("u1", {"k": 1, "l": 2})


async def test_what_a_conversation_lacks_is_added_and_what_it_has_stays(database, tenant):
    """A user or metadata that is missing is taken from the file, and none is no conflict."""
    await import_file(database, lines_of(conversation(turn("a"), user="u1")), tenant=tenant)
    report = await import_file(
        database, lines_of(conversation(turn("a"), user="u2", metadata={"k": 1})), tenant=tenant
    )
    assert problems(report) == [(1, "conflict", "user")]
    without = await import_file(
        database, lines_of(conversation(turn("a"), metadata={}, user=None)), tenant=tenant
    )
    assert without.ok
    (line,) = await exported(database, tenant)
    assert (line["user"], line["metadata"]) == ("u1", {"k": 1})


async def test_an_id_that_is_twice_in_a_line_is_stored_once(database, tenant):
    """An equal repeat within a line is known, another body is a conflict; likewise in a later line."""
    twice = conversation(turn("a", id="i"), turn("a", id="i"), turn("b", id="i"))
    report = await import_file(database, lines_of(twice, conversation(turn("c", id="i"))), tenant=tenant)
    assert counts(report) == (1, 1, 2, 0)
    assert problems(report) == [(1, "conflict", "items[2]"), (2, "conflict", "items[0]")]
    assert [json.loads(row["data"]) for row in await rows_of(database, tenant)] == [turn("a", id="i")]


async def test_a_removed_item_does_not_come_back(database, tenant):
    """An item that was removed since the last import stays removed."""
    lines = lines_of(conversation(turn("a"), turn("b")))
    await import_file(database, lines, tenant=tenant)
    async with database.transaction() as connection:
        await removals.remove(connection, [Cut(tenant, "c1", 2, 0, 2, None)])
    report = await import_file(database, lines, tenant=tenant)
    assert (counts(report), report.removed, report.ok) == ((0, 1, 0, 0), 1, True)
    (line,) = await exported(database, tenant)
    assert [item["content"] for item in line["items"]] == ["b"]


async def erase(database, tenant, named="c1"):
    async with database.transaction() as connection:
        await removals.erase(connection, [Erasure(tenant, named, pack(1, 7))])


async def test_an_erased_conversation_is_not_brought_back(database, tenant):
    """Neither items nor user or metadata; it is counted, and the others of the file are stored."""
    lines = lines_of(
        conversation(turn("a"), turn("b"), user="u1", metadata={"k": 1}), conversation(turn("c"), named="c2")
    )
    await import_file(database, lines[:1], tenant=tenant)
    await erase(database, tenant)
    report = await import_file(database, lines, tenant=tenant)
    assert (counts(report), report.erased, report.ok) == ((1, 0, 0, 0), 2, True)
    assert [line["conversation_id"] for line in await exported(database, tenant)] == ["c2"]
    large = await import_file(
        database, lines_of(conversation(*map(turn, "abcde"))), tenant=tenant, batch_items=2
    )
    assert (counts(large), large.erased) == ((0, 0, 0, 0), 5)
    assert await rows_of(database, tenant) == []


async def test_an_import_raced_with_an_erasure_leaves_nothing_of_it(database, tenant):
    """Whichever comes first, of each conversation everything is gone, or refused."""
    names = [f"c{n}" for n in range(30)]
    lines = lines_of(*(conversation(*map(turn, "abc"), named=name, user="u1") for name in names))

    async def erase_all():
        for name in names:
            await erase(database, tenant, name)

    report, *_ = await asyncio.gather(
        import_file(database, lines, tenant=tenant, batch_items=15), erase_all()
    )
    assert report.stored + report.erased == 90
    assert await exported(database, tenant) == []
    for name in names:
        assert await rows_of(database, tenant, name) == []


async def test_a_row_that_postgres_refuses_costs_only_its_line(database, tenant):
    """Where a constraint of the database's own refuses a row, all other lines are stored."""
    async with database.connection() as connection:
        await connection.execute(
            "alter table buffer.items add constraint poison "
            f"check (tenant <> '{tenant}' or item_id <> 'poison')"
        )
    bad = conversation(turn("x"), turn("x", id="poison"), named="c2")
    lines = lines_of(*(conversation(turn("x"), named=f"c{n}") if n != 2 else bad for n in range(7)))
    report = await import_file(database, lines, tenant=tenant)
    many = conversation(*(turn("x", id="poison" if n == 5 else f"i{n}") for n in range(9)), named="large")
    large = await import_file(database, lines_of(many), tenant=tenant, batch_items=2)
    async with database.connection() as connection:
        await connection.execute("alter table buffer.items drop constraint poison")
    assert problems(report) == [(3, "rejected", None)]
    assert "poison" in report.problems[0].message
    assert counts(report) == (6, 0, 0, 1)
    assert problems(large) == [(1, "rejected", "items[4]")]
    assert counts(large) == (4, 0, 0, 1)
    assert (report.conversations, large.conversations) == (6, 0)


# --- transactions


async def test_a_transaction_is_bounded_and_never_holds_half_a_conversation(database, tenant):
    """By items and by bytes; only a conversation that is larger than a batch is split, in order."""
    sizes = {"a": 30, "b": 60, "c": 250, "d": 40, "e": 61, "f": 100, "g": 1}
    lines = lines_of(
        *(conversation(*(turn(f"{n:0100}") for n in range(size)), named=name) for name, size in sizes.items())
    )
    nbytes = len(encode_item(turn("0" * 100), "item", 1 << 20))
    for limits in ({"batch_items": 100}, {"batch_bytes": 100 * nbytes}):
        owner = f"{tenant}-{next(iter(limits))}"
        report = await import_file(database, lines, tenant=owner, **limits)
        assert report.stored == sum(sizes.values())
        sizes_of = Counter()
        transactions = defaultdict(set)
        for name, size in sizes.items():
            rows = await rows_of(database, owner, name)
            assert [json.loads(row["data"])["content"] for row in rows] == [f"{n:0100}" for n in range(size)]
            sizes_of.update(row["xmin"] for row in rows)
            transactions[name] = {row["xmin"] for row in rows}
        assert max(sizes_of.values()) <= 100
        assert {name for name, found in transactions.items() if len(found) > 1} == {"c"}
        assert len(sizes_of) < 10


async def test_order_holds_across_the_transactions_of_a_large_conversation(database, tenant):
    """Also where the clock of the items goes back just where the conversation is split."""
    items = [turn(str(n), created_at=(NOON - timedelta(hours=n)).timestamp()) for n in range(9)]
    for _ in range(2):
        report = await import_file(database, lines_of(conversation(*items)), tenant=tenant, batch_items=2)
        assert (report.stored + report.known, report.conversations) == (9, 1)
    assert [json.loads(row["data"]) for row in await rows_of(database, tenant)] == items


async def test_an_import_reads_ahead_by_two_batches_at_the_most(database, tenant):
    """Memory is bounded: lines are asked for only while less than two batches wait to be stored."""
    ahead = []
    report = ImportReport()

    def lines():
        for n in range(400):
            ahead.append(n - report.stored)
            yield json.dumps(conversation(turn("x"), named=f"c{n}"))

    def progress(now):
        report.stored = now.stored

    assert (
        await import_file(database, lines(), tenant=tenant, batch_items=20, on_progress=progress)
    ).stored == 400
    assert report.stored == 400
    assert max(ahead) <= 2 * 20


async def test_an_import_that_was_cut_off_is_completed_by_a_repeat(database, tenant):
    """What was stored before the error stays, and a repeat adds only the rest."""
    lines = lines_of(*(conversation(turn("x"), turn("y"), named=f"c{n:02}") for n in range(50)))

    def torn():
        yield from lines[:30]
        raise OSError("the file went away")

    with pytest.raises(OSError, match="went away"):
        await import_file(database, torn(), tenant=tenant, batch_items=10)
    assert "import-batch" not in {task.get_name() for task in asyncio.all_tasks()}
    kept = sum(len(line["items"]) for line in await exported(database, tenant))
    assert 0 < kept < 60
    assert counts(await import_file(database, lines, tenant=tenant)) == (100 - kept, kept, 0, 0)


IMPORT = """
import asyncio, sys
from buffer.settings import Settings
from buffer.store.pool import Database
from buffer.transfer import import_file

async def main(url, path, tenant):
    database = Database(Settings(postgres_url=url), "test-import")
    await database.open()
    print("ready", flush=True)
    sys.stdin.readline()
    with open(path, "rb") as lines:
        report = await import_file(database, lines, tenant=tenant, batch_items=50)
    print(report.stored, report.known, report.conflicts, report.rejected)
    await database.close()

asyncio.run(main(*sys.argv[1:]))
"""


async def test_two_processes_that_import_the_same_file_store_it_once(settings, database, tenant, tmp_path):
    """Both succeed, and what one has stored the other finds known."""
    file = tmp_path / "same.jsonl"
    lines = lines_of(*(conversation(*(turn(str(n)) for n in range(7)), named=f"c{n:03}") for n in range(200)))
    file.write_bytes(b"\n".join(lines))
    command = [sys.executable, "-c", IMPORT, settings.postgres_url, str(file), tenant]
    pipes = {"stdin": asyncio.subprocess.PIPE, "stdout": asyncio.subprocess.PIPE}
    both = [await asyncio.create_subprocess_exec(*command, **pipes) for _ in range(2)]
    for process in both:
        assert await process.stdout.readline() == b"ready\n"
    answers = [out for out, _ in await asyncio.gather(*(process.communicate(b"go\n") for process in both))]
    totals = [tuple(map(int, answer.split())) for answer in answers]
    assert [stored + known for stored, known, *_ in totals] == [1_400, 1_400]
    assert [sum(column) for column in zip(*totals, strict=True)] == [1_400, 1_400, 0, 0]
    assert sum(len(line["items"]) for line in await exported(database, tenant)) == 1_400


async def _blocked(connection, application, how_many=1):
    """The backends of this application that wait for a lock, once there are so many; who blocks each."""
    async with asyncio.timeout(20):
        while True:
            rows = await connection.fetch(
                "select pid, pg_blocking_pids(pid) as by from pg_stat_activity "
                "where application_name = $1 and wait_event_type = 'Lock' and datname = current_database()",
                application,
            )
            if len(rows) >= how_many:
                return {row["pid"]: set(row["by"]) for row in rows}
            await asyncio.sleep(0.01)


async def test_imports_in_opposite_order_do_not_deadlock(settings, database, tenant):
    """Whatever the order in their files, imports of the same conversations queue up in one order."""
    names = ["a", "m", "z"]
    items = [turn(str(n), id=f"i{n}") for n in range(5)]
    other = await asyncio.wait_for(asyncpg.connect(settings.postgres_url), 10)
    await import_file(database, lines_of(*(conversation(named=name) for name in names)), tenant=tenant)
    lock = other.transaction()
    await lock.start()
    middle = "select from buffer.conversations where tenant = $1 and conversation = 'm' for update"
    await other.execute(middle, tenant)

    def start(order, some):
        lines = lines_of(*(conversation(*some, named=name) for name in order))
        return asyncio.create_task(import_file(database, lines, tenant=tenant))

    async with database.connection() as watching:
        first = start(names, items)
        (one,) = await _blocked(watching, "test-transfer")
        second = start(names[::-1], items[::-1])
        waiting = await _blocked(watching, "test-transfer", 2)
    # The second holds nothing yet that the first will want: it waits for the first, at "a".
    assert waiting.pop(one) == {other.get_server_pid()}
    assert list(waiting.values()) == [{one}]
    await lock.rollback()
    await other.close()
    assert counts(await first) == (15, 0, 0, 0)
    assert counts(await second) == (0, 15, 0, 0)


async def test_a_flush_that_brings_the_same_id_meanwhile_does_not_stop_an_import(settings, database, tenant):
    """An id that is stored between the import's look and its COPY is found known when it looks again."""
    other = await asyncio.wait_for(asyncpg.connect(settings.postgres_url), 10)
    flush = other.transaction()
    await flush.start()
    row = Row(tenant, "c1", pack(1, 0), "i1", NOON, json.dumps(turn("a", id="i1")))
    await copy_rows(other, [row])
    lines = lines_of(conversation(turn("a", id="i1"), turn("b", id="i2")))
    importing = asyncio.create_task(import_file(database, lines, tenant=tenant))
    async with database.connection() as watching:
        await _blocked(watching, "test-transfer")
    await flush.commit()
    await other.close()
    report = await importing
    assert (counts(report), report.ok) == ((1, 1, 0, 0), True)
    assert [row["item_id"] for row in await rows_of(database, tenant)] == ["i2", "i1"]


async def test_a_lost_connection_does_not_stop_an_import(settings, database, tenant):
    """A transaction whose backend is gone is done again on a new connection."""
    other = await asyncio.wait_for(asyncpg.connect(settings.postgres_url), 10)
    lines = lines_of(conversation(turn("a")), conversation(turn("b"), named="c2"))
    await import_file(database, lines[:1], tenant=tenant)
    lock = other.transaction()
    await lock.start()
    await other.execute("select from buffer.conversations where tenant = $1 for update", tenant)
    importing = asyncio.create_task(import_file(database, lines, tenant=tenant))
    async with database.connection() as watching:
        (pid,) = await _blocked(watching, "test-transfer")
        await watching.execute("select pg_terminate_backend($1)", pid)
    await lock.rollback()
    await other.close()
    assert counts(await importing) == (1, 1, 0, 0)
