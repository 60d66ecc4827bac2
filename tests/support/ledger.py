"""A ledger of what clients were told, to be compared with what the service holds.

It knows nothing of how the service works: only receipts on one side, and rows or reads on the other.
"""

from __future__ import annotations

import asyncio
import json
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields
from itertools import pairwise
from typing import Any, NamedTuple

import asyncpg

from buffer import Buffer, Conversation, Page, Receipt, Unavailable

PAGE = 1_000


class Seen(NamedTuple):
    """One item as the service shows it."""

    id: str
    position: int
    body: Mapping[str, Any]


class Ack(NamedTuple):
    """One item as its writer was told."""

    writer: str
    id: str
    position: int
    body: Mapping[str, Any]


Contents = Mapping[str, list[Seen]]


@dataclass(slots=True)
class Faults:
    """What is wrong, as conversation and item ids; false where nothing is."""

    lost: list[tuple[str, str]] = field(default_factory=list)
    doubled: list[tuple[str, str]] = field(default_factory=list)
    out_of_order: list[tuple[str, str]] = field(default_factory=list)
    altered: list[tuple[str, str]] = field(default_factory=list)
    unexpected: list[tuple[str, str]] = field(default_factory=list)

    def __bool__(self) -> bool:
        return any(getattr(self, f.name) for f in fields(self))

    def __repr__(self) -> str:
        found = {f.name: getattr(self, f.name) for f in fields(self)}
        return ", ".join(f"{len(v)} {name} {v[:5]}" for name, v in found.items() if v) or "no faults"


class Ledger:
    """Acks by conversation, in the order in which each writer got them."""

    def __init__(self, tenant: str = "default") -> None:
        self.tenant = tenant
        self._acked: dict[str, list[Ack]] = defaultdict(list)
        self._unknown: dict[str, dict[str, Mapping[str, Any]]] = defaultdict(dict)

    @property
    def items(self) -> int:
        """Acked items."""
        return sum(map(len, self._acked.values()))

    @property
    def conversations(self) -> list[str]:
        return list(self._acked.keys() | self._unknown.keys())

    def last_id(self, conversation: str) -> str:
        """The id of the item that was acked last."""
        return self._acked[conversation][-1].id

    def ack(self, conversation: str, receipt: Receipt, body: Mapping[str, Any], writer: str = "") -> None:
        """An item was acked; call it in the order of the acks."""
        self._unknown[conversation].pop(receipt.id, None)
        self._acked[conversation].append(Ack(writer, receipt.id, receipt.position, body))

    def unknown(self, conversation: str, item_id: str, body: Mapping[str, Any]) -> None:
        """The outcome of an item is unknown: it may be there, once, or not."""
        self._unknown[conversation][item_id] = body

    def faults(self, contents: Contents) -> Faults:
        """Compare with everything that the service holds, each conversation in its order."""
        found = Faults()
        for conversation in self._acked.keys() | self._unknown.keys() | contents.keys():
            seen = contents.get(conversation, [])
            self._compare(conversation, seen, found)
        return found

    def _compare(self, conversation: str, seen: list[Seen], found: Faults) -> None:
        acked = {ack.id: ack for ack in self._acked.get(conversation, [])}
        places = {(ack.id, ack.position) for ack in self._acked.get(conversation, [])}
        moved = {item_id for item_id, n in Counter(item_id for item_id, _ in places).items() if n > 1}
        unknown = self._unknown.get(conversation, {})
        times = Counter(item.id for item in seen)
        bodies = Counter(json.dumps(item.body, sort_keys=True) for item in seen)
        found.lost += [(conversation, item_id) for item_id in acked if not times[item_id]]
        found.doubled += [(conversation, item_id) for item_id, n in times.items() if n > 1]
        found.doubled += [(conversation, body) for body, n in bodies.items() if n > 1]
        found.out_of_order += _disorder(conversation, self._acked.get(conversation, []), seen)
        for item in seen:
            ack = acked.get(item.id)
            expected = ack.body if ack is not None else unknown.get(item.id)
            if expected is None:
                found.unexpected.append((conversation, item.id))
            elif (
                dict(expected) != dict(item.body)
                or (ack is not None and ack.position != item.position)
                or item.id in moved
            ):
                found.altered.append((conversation, item.id))


def _disorder(conversation: str, acks: Iterable[Ack], seen: list[Seen]) -> list[tuple[str, str]]:
    """Each writer's acks must ascend, and so must what is seen; both in the same order of ids."""
    wrong = [(conversation, b.id) for a, b in pairwise(seen) if b.position <= a.position]
    place = {item.id: index for index, item in enumerate(seen)}
    last: dict[str, Ack] = {}
    for ack in acks:
        before = last.get(ack.writer)
        if before is not None and (
            ack.position <= before.position or place.get(ack.id, len(seen)) < place.get(before.id, -1)
        ):
            wrong.append((conversation, ack.id))
        last[ack.writer] = ack
    return wrong


async def in_postgres(postgres: asyncpg.Connection, tenant: str = "default") -> Contents:
    """Every item that Postgres holds, by conversation, in position order."""
    rows = await postgres.fetch(
        "select conversation, item_id, position, data from buffer.items "
        "where tenant = $1 and data is not null order by conversation, position",
        tenant,
    )
    contents: dict[str, list[Seen]] = defaultdict(list)
    for row in rows:
        contents[row["conversation"]].append(Seen(row["item_id"], row["position"], json.loads(row["data"])))
    return contents


async def _page(conversation: Conversation, after: int | None) -> Page:
    """A page; "not now" is no fault, and asked again a few times."""
    for _ in range(5):
        try:
            return await conversation.items(after=after, limit=PAGE)
        except Unavailable as error:
            await asyncio.sleep(error.retry_after)
    return await conversation.items(after=after, limit=PAGE)


async def in_reads(
    buffer: Buffer,
    conversations: Iterable[str],
    tenant: str = "default",
    *,
    incomplete: set[str] | None = None,
) -> Contents:
    """Every item that the API shows of these conversations, page by page.

    ``incomplete`` takes the names of those of which it said that a part is missing.
    """
    contents: dict[str, list[Seen]] = {}
    for name in conversations:
        conversation = buffer.conversation(name, tenant=tenant)
        seen = contents[name] = []
        more = True
        while more:
            page = await _page(conversation, seen[-1].position if seen else None)
            seen += [Seen(item.id, item.position, dict(item)) for item in page.items]
            more = page.has_more
            if incomplete is not None and not page.complete:
                incomplete.add(name)
    return contents
