"""A database, a tenant of the test's own, and what the tests of import and export say over and over."""

from __future__ import annotations

import asyncio
import json
import uuid
from datetime import UTC, datetime, timedelta

import asyncpg
import pytest

from buffer.model.codec import encode_item
from buffer.model.position import pack
from buffer.store.items import NewConversation, Row, add_conversations, copy_rows
from buffer.store.pool import Database
from buffer.transfer import ImportReport, export
from tests.conftest import settings_for

NOON = datetime(2024, 5, 1, 12, tzinfo=UTC)


@pytest.fixture(scope="module")
def settings(servers):
    """One database for a module: its tests share nothing but tables, since each has its own tenant."""
    name = f"transfer_{uuid.uuid4().hex}"
    url = servers.postgres.url.replace("/buffer?", "/postgres?")
    asyncio.run(_execute(url, f"create database {name} template buffer"))
    yield settings_for(servers, name)
    asyncio.run(_execute(url, f"drop database {name} with (force)"))


async def _execute(url, sql):
    connection = await asyncpg.connect(url)
    await connection.execute(sql)
    await connection.close()


@pytest.fixture
async def database(settings):
    """A pool on that database; its connections show as ``test-transfer``."""
    database = Database(settings, "test-transfer")
    await database.open()
    yield database
    await database.close()


@pytest.fixture
def tenant():
    """A tenant that nobody else uses."""
    return f"t-{uuid.uuid4().hex}"


def lines_of(*conversations):
    return [json.dumps(conversation).encode() for conversation in conversations]


def conversation(*items, named="c1", **more):
    return {"conversation_id": named, "items": list(items), **more}


def turn(text, **more):
    return {"role": "user", "content": text, **more}


async def exported(database, tenant, **options):
    out = []
    report = await export(database, out.append, tenant=tenant, **options)
    lines = [json.loads(line) for line in b"".join(out).splitlines()]
    assert report.conversations == len(lines)
    assert report.items == sum(len(line["items"]) for line in lines)
    assert report.nbytes == len(b"".join(out))
    return lines


async def rows_of(database, tenant, conversation="c1"):
    async with database.connection() as connection:
        return await connection.fetch(
            "select position, item_id, created_at, data, xmin::text from buffer.items "
            "where tenant = $1 and conversation = $2 order by position",
            tenant,
            conversation,
        )


async def append_live(database, tenant, bodies, *, user=None, times=None):
    """What a flush does with items that were appended under these ids: positions of epoch 1."""
    times = times or [NOON + timedelta(seconds=n) for n in range(len(bodies))]
    rows = [
        Row(tenant, "c1", pack(1, n), item_id, time, encode_item(body, "item", 1 << 20).decode())
        for n, ((item_id, body), time) in enumerate(zip(bodies, times, strict=True))
    ]
    async with database.transaction() as connection:
        await copy_rows(connection, rows)
        await add_conversations(connection, [NewConversation(tenant, "c1", user, times[0], times[-1])])


def counts(report: ImportReport):
    return report.stored, report.known, report.conflicts, report.rejected


def problems(report: ImportReport):
    return [(p.line, p.kind, p.param) for p in report.problems]
