"""``buffer import``, ``buffer export``, ``buffer tail``."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Annotated, Any

import anyio
from cyclopts import Parameter

from buffer.app.runtime import Runtime, open_database
from buffer.cli.common import EXIT_FAILED, Common, note, print_json, run
from buffer.errors import SettingsError
from buffer.model.ids import check_id
from buffer.model.types import Item
from buffer.transfer import ExportReport, ImportProgress, import_file
from buffer.transfer import export as export_rows

_PROGRESS_SECONDS = 0.5
_TAIL_POLL_SECONDS = 0.1


class Progress:
    """A line on stderr now and then, rewritten in place on a terminal."""

    def __init__(self) -> None:
        self._began = self._last = time.monotonic()

    def show(self, text: str, *, last: bool = False) -> None:
        """Write the line if the last one is old enough, or if it is the last."""
        now = time.monotonic()
        if not last and now - self._last < _PROGRESS_SECONDS:
            return
        self._last = now
        terminal = sys.stderr.isatty()
        begin, end = ("\r" if terminal else ""), ("\n" if last or not terminal else "")
        sys.stderr.write(f"{begin}{text}, {now - self._began:.1f} s{end}")
        sys.stderr.flush()


def import_(
    file: Annotated[
        Path, Parameter(help="JSONL, a conversation a line; - is stdin.", allow_leading_hyphen=True)
    ],
    *,
    tenant: Annotated[
        str | None, Parameter(help="Owner of everything; else each line's own, or default.")
    ] = None,
    json: Annotated[bool, Parameter(negative="")] = False,
    common: Common | None = None,
) -> int:
    """Load conversations from JSONL straight into Postgres. Repeating it stores nothing twice.

    Imported items stand before everything that was appended live. Exits 1 if anything was refused.
    """
    settings = (common or Common()).settings()
    if str(file) != "-" and not file.is_file():
        raise SettingsError(f"{file} does not exist")
    progress = Progress()

    def on_progress(now: ImportProgress) -> None:
        progress.show(f"{now.conversations} conversations, {now.stored} items stored, {now.known} known")

    async def main() -> int:
        async with open_database(settings) as database:
            with sys.stdin.buffer if str(file) == "-" else file.open("rb") as lines:
                report = await import_file(
                    database,
                    lines,
                    tenant=tenant,
                    settings=settings,
                    on_progress=on_progress,
                    on_problem=lambda problem: note(str(problem)),
                )
        progress.show(f"{report.conversations} conversations read", last=True)
        counts = {
            "conversations": report.conversations,
            "stored": report.stored,
            "already_stored": report.known,
            "removed_before": report.removed,
            "erased_before": report.erased,
            "conflicts": report.conflicts,
            "rejected_lines": report.rejected,
        }
        if json:
            print_json({**counts, "problems": [str(problem) for problem in report.problems]})
        else:
            print(", ".join(f"{count} {name.replace('_', ' ')}" for name, count in counts.items()))
        return 0 if report.ok else EXIT_FAILED

    return run(main)


def export(
    *,
    tenant: str | None = None,
    user: str | None = None,
    output: Annotated[Path | None, Parameter(alias="-o", help="A file instead of stdout.")] = None,
    json: Annotated[bool, Parameter(negative="", help="A report on stderr as JSON.")] = False,
    flush_timeout: Annotated[float, Parameter(help="Seconds to wait for unflushed items first.")] = 10.0,
    common: Common | None = None,
) -> None:
    """Write conversations as JSONL, what was appended just before included."""
    settings = (common or Common(log_level="warning")).settings()

    async def main() -> ExportReport:
        async with Runtime.open(settings, flusher=False) as runtime:
            with anyio.move_on_after(flush_timeout) as waiting:
                await runtime.flush()
            if waiting.cancelled_caught:
                note(f"not everything was flushed within {flush_timeout:g} s; exporting what is in Postgres")
            with sys.stdout.buffer if output is None else output.open("wb") as out:
                report = await export_rows(runtime.database, out.write, tenant=tenant, user=user)
                out.flush()
                return report

    report = run(main)
    if json:
        sys.stderr.write(f'{{"conversations": {report.conversations}, "items": {report.items}}}\n')
    else:
        note(f"{report.conversations} conversations, {report.items} items")


def tail(
    conversation: str,
    *,
    tenant: str = "default",
    lines: Annotated[int, Parameter(alias="-n", help="How many items to begin with.")] = 10,
    follow: Annotated[
        bool, Parameter(alias="-f", negative="", help="Go on with new items, until Ctrl-C.")
    ] = False,
    json: Annotated[bool, Parameter(negative="", help="A JSON document an item.")] = False,
    common: Common | None = None,
) -> None:
    """Show the newest items of a conversation, unflushed ones included."""
    settings = (common or Common(log_level="warning")).settings()
    check_id(conversation, "conversation")
    check_id(tenant, "--tenant")

    async def main() -> None:
        async with Runtime.open(settings, flusher=False) as runtime:
            items = (await runtime.reader.newest(tenant, conversation, lines)).items
            last = 0
            while True:
                for item in items:
                    _print_item(item, as_json=json)
                    last = item.position
                if not follow:
                    return
                await anyio.sleep(_TAIL_POLL_SECONDS)
                items = (await runtime.reader.oldest(tenant, conversation, 100, last)).items

    run(main)


def _print_item(item: Item, *, as_json: bool) -> None:
    if as_json:
        print_json(
            {"id": item.id, "position": str(item.position), "created_at": item.created_at, "item": item}
        )
        return
    at = item.created_at.astimezone().strftime("%H:%M:%S") if item.created_at else ""
    print(f"{at}  {item.get('role') or item.get('type') or '-':<20} {_text(item)}", flush=True)


def _text(item: Item) -> str:
    content: Any = item.get("content", item.get("arguments", item.get("output")))
    if isinstance(content, list):
        content = " ".join(str(block.get("text", block)) for block in content if isinstance(block, dict))
    text = str(dict(item) if content is None else content).replace("\n", " ")
    return text if len(text) <= 200 else text[:199] + "…"
