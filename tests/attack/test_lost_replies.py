"""The network between a process and Redis loses, cuts and delays: each append counts once."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from urllib.parse import unquote, urlsplit

import asyncpg
import pytest

from buffer import Buffer, OutcomeUnknown, PreconditionFailed, RedisUnavailable, Settings
from tests.support.ledger import in_postgres, in_reads
from tests.support.load import under_load
from tests.support.polling import eventually
from tests.support.proxy import Fault, Proxy, proxied

pytestmark = pytest.mark.attack

_ANSWERED = """
select from pg_stat_activity
where datname = current_database() and state = 'idle' and query like '%select max(position)%'
"""


@pytest.fixture
async def proxy(settings: Settings) -> AsyncIterator[Proxy]:
    async with proxied(Path(urlsplit(settings.redis_url).path)) as proxy:
        yield proxy


@pytest.fixture
async def far(buffer: Buffer, settings: Settings, proxy: Proxy) -> AsyncIterator[Buffer]:
    """A buffer whose way to Redis leads through the proxy; ``buffer`` itself flushes beside it."""
    url = f"redis://127.0.0.1:{proxy.port}"
    async with Buffer.connect(settings, redis=url) as far:
        await far.conversation("warm", tenant="warm").append({"role": "user"})
        yield far


@pytest.mark.parametrize("fault", Fault)
async def test_append_whose_answer_is_lost_is_stored_once(
    far: Buffer, proxy: Proxy, postgres: asyncpg.Connection, fault: Fault
) -> None:
    """The same call ends with a receipt, whether or not the first try had run."""
    conversation = far.conversation("c")
    await conversation.append({"role": "user", "content": "before"}, id="m-1")
    proxy.once(fault, b"needle")
    receipt = await conversation.append({"role": "user", "content": "needle"}, id="m-2")
    assert proxy.struck.is_set()
    if fault is Fault.CUT_BEFORE_REPLY:
        assert receipt.duplicate, "the first try had run"
    again = await conversation.append({"role": "user", "content": "needle"}, id="m-2")
    assert (again.position, again.duplicate) == (receipt.position, True)
    await conversation.flushed(again)
    rows = await postgres.fetch(
        "select item_id, position from buffer.items where conversation = 'c' order by 2"
    )
    assert [row["item_id"] for row in rows] == ["m-1", "m-2"]
    assert rows[1]["position"] == receipt.position


async def test_append_of_unknown_outcome_is_stored_once_when_repeated(
    far: Buffer, proxy: Proxy, postgres: asyncpg.Connection
) -> None:
    """The reply is lost and Redis stays out of reach: unknown. Repeated later: the first receipt."""
    conversation = far.conversation("c")
    proxy.once(Fault.CUT_BEFORE_REPLY, b"needle")
    proxy.refusing = True
    with pytest.raises(OutcomeUnknown) as caught:
        await conversation.append({"role": "user", "content": "needle"}, timeout=0.3)
    (item_id,) = caught.value.ids
    with pytest.raises(RedisUnavailable):  # never sent: certainly not stored
        await conversation.append({"role": "user", "content": "never sent"}, timeout=0.3)
    proxy.refusing = False
    receipt = await conversation.append({"role": "user", "content": "needle"}, id=item_id)
    assert receipt.duplicate
    await conversation.flushed(receipt)
    rows = await postgres.fetch("select item_id, position from buffer.items where conversation = 'c'")
    assert [(row["item_id"], row["position"]) for row in rows] == [(item_id, receipt.position)]


async def test_stalled_network_is_unknown_and_then_stored_once(far: Buffer, proxy: Proxy) -> None:
    """A reply that does not come is an unknown outcome within the time limit, and a repeat settles it."""
    conversation = far.conversation("c")
    proxy.stall()
    began = asyncio.get_running_loop().time()
    with pytest.raises(OutcomeUnknown):
        await conversation.append({"role": "user", "content": "stalled"}, id="m-1", timeout=0.3)
    assert asyncio.get_running_loop().time() - began < 1
    proxy.resume()
    receipt = await conversation.append({"role": "user", "content": "stalled"}, id="m-1")
    assert [item.id for item in (await conversation.items()).items] == ["m-1"]
    assert receipt.id == "m-1"


async def test_batch_cut_in_its_middle_is_stored_whole_or_not_at_all(far: Buffer, proxy: Proxy) -> None:
    """Atomic: of a batch of which Redis got a part, nothing is stored by that try."""
    conversation = far.conversation("c")
    bodies = [{"role": "user", "content": f"needle {i} " + "x" * 2_000} for i in range(200)]
    proxy.once(Fault.CUT_AFTER_REQUEST, b"needle 20 ")
    receipts = await conversation.extend(bodies)
    assert proxy.struck.is_set()
    page = await conversation.items(limit=1_000)
    assert [item.id for item in page.items] == [receipt.id for receipt in receipts]


async def test_cuts_under_load_lose_and_double_nothing(
    far: Buffer, proxy: Proxy, postgres: asyncpg.Connection
) -> None:
    """Connections break again and again, before and after the script ran, with hundreds under way."""
    faults = list(Fault)
    async with under_load(far, writers=32) as load:
        for number in range(30):
            proxy.once(faults[number % len(faults)])
            await asyncio.wait_for(proxy.struck.wait(), 10)
            if number % 10 == 9:
                proxy.cut_all()
            goal = load.acked + 50
            await eventually(lambda goal=goal: load.acked >= goal)
    await far.flush()
    assert not load.ledger.faults(await in_postgres(postgres))
    assert not load.ledger.faults(await in_reads(far, load.ledger.conversations))


@pytest.mark.parametrize("fault", Fault)
async def test_appends_begun_in_order_stay_in_order_when_their_connection_breaks(
    far: Buffer, proxy: Proxy, fault: Fault
) -> None:
    """What is sent again goes before what came later, in its old order."""
    conversation = far.conversation("c")
    proxy.once(fault)
    appends = (conversation.append({"n": number}) for number in range(300))
    receipts = await asyncio.gather(*appends)
    assert proxy.struck.is_set()
    positions = [receipt.position for receipt in receipts]
    assert positions == sorted(positions)
    assert [item["n"] for item in (await conversation.items(limit=1_000)).items] == list(range(300))


async def test_if_match_that_postgres_answered_too_early_does_not_pass(
    buffer: Buffer, settings: Settings, postgres: asyncpg.Connection
) -> None:
    """The last position is read in Postgres; before that answer arrives, another append is flushed."""
    conversation = buffer.conversation("c")
    first = await conversation.append({"n": 1}, durability="stored")
    directory = unquote(settings.postgres_url.partition("?host=")[2])
    async with proxied(Path(directory) / ".s.PGSQL.5432") as proxy:
        url = f"postgresql://postgres@127.0.0.1:{proxy.port}/{settings.key_prefix}?sslmode=disable"
        async with Buffer.connect(settings, postgres=url) as slow:
            with pytest.raises(PreconditionFailed):  # its connection knows the statement from now on
                await slow.conversation("c").append({"n": 2}, if_match=first.position - 1)
            proxy.stall_replies()
            late = asyncio.create_task(slow.conversation("c").append({"n": 2}, if_match=first.position))
            await eventually(lambda: postgres.fetch(_ANSWERED))
            other = await conversation.append({"n": 3}, durability="stored")
            proxy.resume()
            with pytest.raises(PreconditionFailed) as caught:
                await late
            assert caught.value.last_position == other.position
    assert [item["n"] for item in (await conversation.items()).items] == [1, 3]


async def test_slow_network_keeps_order(far: Buffer, proxy: Proxy) -> None:
    """With every piece delayed, the order of acks is still the order of positions."""
    proxy.delay_seconds = 0.005
    conversation = far.conversation("c")
    positions: list[int] = []

    async def append(number: int) -> None:
        positions.append((await conversation.append({"role": "user", "content": str(number)})).position)

    async with asyncio.TaskGroup() as tasks:
        for number in range(200):
            tasks.create_task(append(number))
    assert positions == sorted(positions)
    assert len(set(positions)) == 200
