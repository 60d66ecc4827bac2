"""``buffer erasures``: what was erased, kept beside backups and replayed after a restore."""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path
from typing import Annotated

from cyclopts import App, Parameter

from buffer.app.runtime import open_database
from buffer.cli.common import EXIT_FAILED, Common, note, print_json, run
from buffer.cli.data import Progress
from buffer.errors import SettingsError
from buffer.transfer import ErasureCounts, ReplayReport, export_erasures, replay_erasures

app = App(name="erasures", help="Export what was erased, and erase it again in a restored database.")


@app.command
def export(
    *,
    output: Annotated[Path | None, Parameter(alias="-o", help="A file instead of stdout.")] = None,
    json: Annotated[bool, Parameter(negative="", help="A report on stderr as JSON.")] = False,
    common: Common | None = None,
) -> None:
    """Write which conversations and users were erased as JSONL, without any content of theirs."""
    settings = (common or Common(log_level="warning")).settings()

    async def main() -> ErasureCounts:
        async with open_database(settings) as database:
            with sys.stdout.buffer if output is None else output.open("wb") as out:
                counts = await export_erasures(database, out.write)
                out.flush()
                return counts

    counts = run(main)
    if json:
        sys.stderr.write(f'{{"conversations": {counts.conversations}, "users": {counts.users}}}\n')
    else:
        note(f"{counts.conversations} erased conversations, {counts.users} erased users")


@app.command
def replay(
    file: Annotated[
        Path, Parameter(help="What `erasures export` wrote; - is stdin.", allow_leading_hyphen=True)
    ],
    *,
    json: Annotated[bool, Parameter(negative="", help="One JSON document.")] = False,
    common: Common | None = None,
) -> int:
    """Erase again what the file names: after a restore, before anything else is started.

    May be repeated. Exits 1 if a line was refused.
    """
    settings = (common or Common()).settings()
    if str(file) != "-" and not file.is_file():
        raise SettingsError(f"{file} does not exist")
    progress = Progress()

    def on_progress(now: ReplayReport) -> None:
        progress.show(f"{now.conversations} conversations, {now.users} users, {now.items} items deleted")

    async def main() -> ReplayReport:
        async with open_database(settings) as database:
            with sys.stdin.buffer if str(file) == "-" else file.open("rb") as lines:
                return await replay_erasures(
                    database, lines, settings.shards, on_progress=on_progress, on_problem=note
                )

    report = run(main)
    on_progress(report)
    counts = dataclasses.asdict(report)
    if json:
        print_json(counts)
    else:
        print(", ".join(f"{count} {name}" for name, count in counts.items()))
    return EXIT_FAILED if report.rejected else 0
