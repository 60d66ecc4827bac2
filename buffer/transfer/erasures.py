"""Erasures as JSONL: kept beside a backup, and replayed after it was restored.

A line is an erased conversation, or an erased user; none holds content::

    {"tenant": "acme", "conversation": "c7", "through": "2199023255559", "erased_at": "2026-03-01T12:00:00Z"}
    {"tenant": "acme", "user": "u42", "erased_at": "2026-03-01T12:00:00Z"}
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

import msgspec

from buffer.errors import InvalidRequest
from buffer.model.ids import check_id
from buffer.model.position import MAX_EPOCH, epoch_of
from buffer.store import erasures
from buffer.store.erasures import ErasedConversation, ErasedUser
from buffer.store.pool import Database

# A transaction holds the rows of its shards locked.
_AT_A_TIME = 100


@dataclass(slots=True)
class ErasureCounts:
    """How many erased conversations and users were written, or read."""

    conversations: int = 0
    users: int = 0


@dataclass(slots=True)
class ReplayReport(ErasureCounts):
    """What a replay did.

    ``new``: erasures that this database did not have; ``items``: how many it deleted; ``rejected``: lines.
    """

    new: int = 0
    items: int = 0
    rejected: int = 0


async def export_erasures(database: Database, write: Callable[[bytes], object]) -> ErasureCounts:
    """Write every tombstone, a line each, in order of tenant and id.

    Raises:
        PostgresUnavailable: what was written until then is not all.
    """
    counts = ErasureCounts()
    async for conversations in erasures.conversations(database):
        for one in conversations:
            write(_line({**one._asdict(), "through": str(one.through)}))
        counts.conversations += len(conversations)
    async for users in erasures.users(database):
        for user in users:
            write(_line(user._asdict()))
        counts.users += len(users)
    return counts


def _line(value: dict[str, Any]) -> bytes:
    return msgspec.json.encode({**value, "erased_at": value["erased_at"].isoformat()}) + b"\n"


async def replay_erasures(
    database: Database,
    lines: Iterable[bytes],
    shards: int,
    *,
    on_progress: Callable[[ReplayReport], None] = lambda _: None,
    on_problem: Callable[[str], None] = lambda _: None,
) -> ReplayReport:
    """Erase again what the lines name; what is wrong with one doesn't stop the rest. May be repeated.

    Args:
        database: open, with the schema of this release.
        lines: as `export_erasures` writes them; blank ones are skipped.
        shards: their number, as the database has it.
        on_progress: called after each transaction. The object goes on changing.
        on_problem: called for each line that is refused.

    Raises:
        PostgresUnavailable: repeat it; what was erased stays erased.
    """
    report = ReplayReport()
    conversations: dict[tuple[str, str], ErasedConversation] = {}
    users: dict[tuple[str, str], ErasedUser] = {}

    async def apply() -> None:
        if conversations:
            applied = await erasures.apply_conversations(database, list(conversations.values()), shards)
            report.new += applied.new
            report.items += applied.items
        if users:
            report.new += await erasures.apply_users(database, list(users.values()))
        report.conversations += len(conversations)
        report.users += len(users)
        conversations.clear()
        users.clear()
        on_progress(report)

    for number, raw in enumerate(lines, start=1):
        if not raw or raw.isspace():
            continue
        try:
            erased = _parse(raw)
        except InvalidRequest as error:
            report.rejected += 1
            on_problem(f"line {number}: {error}")
            continue
        if isinstance(erased, ErasedUser):
            users[erased[:2]] = max(erased, users.get(erased[:2], erased))
        else:
            conversations[erased[:2]] = max(erased, conversations.get(erased[:2], erased))
        if len(conversations) + len(users) >= _AT_A_TIME:
            await apply()
    await apply()
    return report


def _parse(raw: bytes) -> ErasedConversation | ErasedUser:
    try:
        value = msgspec.json.decode(raw)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise InvalidRequest(f"not JSON in UTF-8: {error}") from error
    if not isinstance(value, dict):
        raise InvalidRequest(f"must be a JSON object, not {type(value).__name__}")
    tenant = check_id(value.get("tenant"), "tenant")
    erased_at = _time(value.get("erased_at"))
    if "user" in value:
        return ErasedUser(tenant, check_id(value["user"], "user"), erased_at)
    conversation = check_id(value.get("conversation"), "conversation")
    return ErasedConversation(tenant, conversation, _position(value.get("through")), erased_at)


def _time(value: object) -> datetime:
    try:
        time = datetime.fromisoformat(value if isinstance(value, str) else "")
    except ValueError as error:
        raise InvalidRequest("erased_at must be a time in ISO 8601", param="erased_at") from error
    return time if time.tzinfo else time.replace(tzinfo=UTC)


def _position(value: object) -> int:
    # The epoch after it must exist: a database that is restored may have to go on there.
    if not isinstance(value, str) or not (value.isascii() and value.isdigit()) or len(value) > 19:
        raise InvalidRequest("through must be a position as a decimal string", param="through")
    if epoch_of(int(value)) >= MAX_EPOCH:
        raise InvalidRequest("through is beyond every position", param="through")
    return int(value)
