"""Export: conversations from Postgres as JSONL, in the form that import reads.

One state of the database, in order of tenant, conversation and position, without removed items. Memory
stays bounded whatever the size: a long conversation's line is written piece by piece. Items are written
as they are stored, letter for letter; only an id that import could not derive is added, and listed in
``added_ids``, so that importing the export elsewhere gives the same items, ids, times and order.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from contextlib import aclosing
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any, TypeVar

import msgspec

from buffer.errors import InvalidRequest
from buffer.model.codec import decode_item, encode_item
from buffer.model.ids import check_id, derive_item_id
from buffer.store.items import StoredItem
from buffer.store.pool import Database
from buffer.store.transfer import ExportedConversation, snapshot
from buffer.transfer.line import DEFAULT_TENANT, parse_time

_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_MICROSECOND = timedelta(microseconds=1)
_WRITE_BYTES = 64 << 10
_PROGRESS_CONVERSATIONS = 100

_T = TypeVar("_T")

_json = msgspec.json.Encoder().encode


@dataclass(slots=True)
class ExportProgress:
    """How much was written. ``nbytes`` includes the line ends."""

    conversations: int = 0
    items: int = 0
    nbytes: int = 0


@dataclass(slots=True)
class ExportReport(ExportProgress):
    """All that was written: the items that were in Postgres when the export began.

    Items that were acked and not yet flushed by then are not among them: wait for a flush first.
    """


async def export(
    database: Database,
    write: Callable[[bytes], object],
    *,
    tenant: str | None = None,
    user: str | None = None,
    on_progress: Callable[[ExportProgress], None] = lambda _: None,
) -> ExportReport:
    """Write every conversation of the tenant and of the user; None: of all.

    ``write`` gets pieces of some 64 KiB; a piece need not end with a line. ``on_progress`` is called
    every 100 conversations and at the end, with an object that goes on changing. What either raises is
    raised here unchanged.

    Raises:
        InvalidRequest: ``tenant`` or ``user`` is no id.
        PostgresUnavailable: it went away; what is written so far may end within a line.
    """
    for name, value in (("tenant", tenant), ("user", user)):
        if value is not None:
            check_id(value, name)
    out = _Output(write)
    line: _Line | None = None
    try:
        async with snapshot(database) as rows, aclosing(rows.stream(tenant, user)) as stream:
            async for row in stream:
                if isinstance(row, StoredItem):
                    assert line is not None
                    line.add(row)
                    continue
                if line is not None:
                    line.end()
                    if out.report.conversations % _PROGRESS_CONVERSATIONS == 0:
                        _call(on_progress, out.report)
                line = _Line(out, row)
            if line is not None:
                line.end()
            out.flush()
    except _CallbackFailed as failed:
        raise failed.error from None
    on_progress(out.report)
    return out.report


class _CallbackFailed(Exception):
    """Carries an error through the layer that would take a broken pipe for a broken connection."""

    def __init__(self, error: Exception) -> None:
        super().__init__(str(error))
        self.error = error


def _call(callback: Callable[[_T], object], argument: _T) -> None:
    try:
        callback(argument)
    except (OSError, EOFError) as error:
        raise _CallbackFailed(error) from error


class _Output:
    """Gathers small pieces into larger ones."""

    def __init__(self, write: Callable[[bytes], object]) -> None:
        self._write = write
        self._pieces: list[bytes] = []
        self._waiting = 0
        self.report = ExportReport()

    def put(self, piece: bytes) -> None:
        """Add a piece."""
        self._pieces.append(piece)
        self._waiting += len(piece)
        if self._waiting >= _WRITE_BYTES:
            self.flush()

    def flush(self) -> None:
        """Write what is gathered."""
        data = b"".join(self._pieces)
        self._pieces.clear()
        self._waiting = 0
        self.report.nbytes += len(data)
        _call(self._write, data)


class _Line:
    """One conversation on its way out: the head at once, then item by item, then what import must know."""

    def __init__(self, out: _Output, conversation: ExportedConversation) -> None:
        self._out = out
        self._conversation = conversation.conversation
        self._items = 0
        self._added: list[int] = []
        self._null: list[int] = []
        self._times: list[bytes] = []
        # What import would take an item's time for, if it had none of its own.
        self._time = conversation.created_at
        self._times_differ = False
        head = {
            "conversation_id": conversation.conversation,
            "tenant": conversation.tenant if conversation.tenant != DEFAULT_TENANT else None,
            "user": conversation.user,
            "created_at": msgspec.Raw(_seconds(conversation.created_at)),
            "metadata": msgspec.Raw(_one_line(conversation.metadata or "{}").encode()),
        }
        head = {key: value for key, value in head.items() if value is not None}
        out.put(_json(head)[:-1] + b',"items":[')
        out.report.conversations += 1

    def add(self, item: StoredItem) -> None:
        """Write the next item."""
        data = _one_line(item.data)
        body: dict[str, Any] = {}
        # Both keys are rare, and our encoder never escapes their letters.
        if '"id"' in data or '"created_at"' in data:
            body = decode_item(data)
        self._note_time(item.created_at, body)
        if body.get("id") is None and item.item_id != derive_item_id(self._conversation, self._items):
            data = self._with_id(data, body, item.item_id)
        self._out.put((b"," if self._items else b"") + data.encode())
        self._items += 1
        self._out.report.items += 1

    def end(self) -> None:
        """Close the line."""
        tail = b"]"
        if self._added:
            tail += b',"added_ids":' + _json(self._added)
        if self._null:
            tail += b',"null_ids":' + _json(self._null)
        if self._times_differ:
            tail += b',"item_times":[' + b",".join(self._times) + b"]"
        self._out.put(tail + b"}\n")

    def _note_time(self, stored: datetime, body: dict[str, Any]) -> None:
        own = body.get("created_at")
        try:
            self._time = self._time if own is None else parse_time(own, "created_at")
        except InvalidRequest:
            # A word of the application's own: import must not try to read it.
            self._times_differ = True
        if self._time != stored:
            self._times_differ = True
            self._time = stored
        self._times.append(_seconds(stored))

    def _with_id(self, data: str, body: dict[str, Any], item_id: str) -> str:
        if "id" in body:
            self._null.append(self._items)
            body["id"] = item_id
            return encode_item(body, "item", sys.maxsize).decode()
        self._added.append(self._items)
        rest = data[data.index("{") + 1 :]
        comma = "" if rest.lstrip().startswith("}") else ","
        return f'{{"id":{_json(item_id).decode()}{comma}{rest}'


def _seconds(time: datetime) -> bytes:
    """Unix seconds as JSON, exact to the microsecond."""
    seconds, micros = divmod((time - _EPOCH) // _MICROSECOND, 1_000_000)
    return (f"{seconds}.{micros:06}".rstrip("0") if micros else str(seconds)).encode()


def _one_line(data: str) -> str:
    """The same JSON without line ends, which can only be white space; ours has none."""
    return data.replace("\n", " ").replace("\r", " ") if "\n" in data or "\r" in data else data
