"""Import: conversations from JSONL straight into Postgres, at the beginning of their conversations.

* **Once.** An item is known by its id; one without an id gets one from its conversation and its place
  there. What is stored already is left alone, so an import can be repeated, cut off and run beside itself.
* **Order.** Imported items have positions of epoch 0, before everything that was ever appended. An item's
  time sets its position, at least one after the item before it in the file; one without a time follows
  the item before it, and as the first of its line whatever was imported before. A position that is taken
  gives way to the next free one.
* **Gone is gone.** What was deleted here stays away, and so does everything of a conversation that was
  erased, also if it has begun anew.
* **Whole.** A line is stored in one transaction, unless it alone is larger than a batch, or it is refused.
"""

from __future__ import annotations

import asyncio
import codecs
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime

from buffer.errors import InvalidRequest
from buffer.model.ids import check_id
from buffer.settings import Settings
from buffer.store.pool import Database
from buffer.transfer.batch import Outcome, Part, Problem, store
from buffer.transfer.line import Line, LineItem, Rules, parse_line

KEPT_PROBLEMS = 1_000


@dataclass(slots=True)
class ImportProgress:
    """How far an import is.

    Items: ``stored`` now, ``known`` before; left out because they were ``removed`` before, or because their
    conversation was ``erased``.
    ``lines`` and ``nbytes`` count what was read, ``conversations`` the lines that are dealt with.
    ``rejected`` counts lines, ``conflicts`` items, users and metadata.
    """

    lines: int = 0
    nbytes: int = 0
    conversations: int = 0
    stored: int = 0
    known: int = 0
    removed: int = 0
    erased: int = 0
    conflicts: int = 0
    rejected: int = 0


@dataclass(slots=True)
class ImportReport(ImportProgress):
    """The end of an import. ``problems`` holds the first 1,000; the counts cover all of them."""

    problems: list[Problem] = field(default_factory=list)

    @property
    def ok(self) -> bool:
        """Whether everything of the file is stored, but for what was removed or erased here."""
        return not (self.conflicts or self.rejected)


async def import_file(
    database: Database,
    lines: Iterable[bytes | str],
    *,
    tenant: str | None = None,
    settings: Settings | None = None,
    batch_items: int = 5_000,
    batch_bytes: int = 8 << 20,
    on_progress: Callable[[ImportProgress], None] = lambda _: None,
    on_problem: Callable[[Problem], None] = lambda _: None,
) -> ImportReport:
    """Store what the lines hold (see `buffer.transfer.line`); what is wrong with one doesn't stop the rest.

    Args:
        database: open, with the schema of this release.
        lines: one conversation each, such as a file opened in binary mode; blank ones are skipped.
        tenant: owner of everything; a line that names another is refused.
            None: each line's own, or ``default``.
        settings: for ``max_item_bytes``; those of the environment by default.
        batch_items: a transaction stores this many items at the most,
        batch_bytes: and about this many bytes; two batches are held in memory.
        on_progress: called after each transaction. The object goes on changing.
        on_problem: called for each problem, in no strict order of lines.

    Raises:
        InvalidRequest: ``tenant`` is no id.
        PostgresUnavailable: it stayed away for several tries; repeat the import, what is stored stays.
        SchemaMismatch: the database does not carry the schema.
    """
    settings = settings or Settings.load()
    rules = Rules(
        None if tenant is None else check_id(tenant, "tenant"), settings.max_item_bytes, datetime.now(UTC)
    )
    run = _Import(
        database,
        rules,
        batch_items=batch_items,
        batch_bytes=batch_bytes,
        on_progress=on_progress,
        on_problem=on_problem,
    )
    try:
        await run.read(lines)
    finally:
        await run.close()
    return run.report


class _Import:
    """One run: lines are read and checked into the next batch while the last one is written."""

    def __init__(
        self,
        database: Database,
        rules: Rules,
        *,
        batch_items: int,
        batch_bytes: int,
        on_progress: Callable[[ImportProgress], None],
        on_problem: Callable[[Problem], None],
    ) -> None:
        self._database = database
        self._rules = rules
        self._batch_items = batch_items
        self._batch_bytes = batch_bytes
        self._on_progress = on_progress
        self._on_problem = on_problem
        self._batch: dict[tuple[str, str], Part] = {}
        self._items = self._nbytes = 0
        self._writing: asyncio.Task[None] | None = None
        self.report = ImportReport()

    async def read(self, lines: Iterable[bytes | str]) -> None:
        """Everything, to the end."""
        report = self.report
        for number, text in enumerate(lines, start=1):
            raw = text.encode("utf-8", "surrogatepass") if isinstance(text, str) else text
            report.lines += 1
            report.nbytes += len(raw)
            raw = raw.removeprefix(codecs.BOM_UTF8) if number == 1 else raw
            if not raw or raw.isspace():
                continue
            try:
                line = parse_line(raw, number, self._rules)
            except InvalidRequest as error:
                self._problem(Problem(number, "rejected", error.param, str(error)))
            else:
                await self._add(line)
            if self._writing is not None:
                await asyncio.sleep(0)  # let the writer on
        await self._hand_over()
        await self._written()

    async def close(self) -> None:
        """Stop what is being written, if anything."""
        if self._writing is not None:
            self._writing.cancel()
            await asyncio.gather(self._writing, return_exceptions=True)

    async def _add(self, line: Line) -> None:
        nbytes = sum(len(item.data) for item in line.items)
        full = self._items + len(line.items) > self._batch_items or self._nbytes + nbytes > self._batch_bytes
        if full or line.key in self._batch:
            await self._hand_over()
        if len(line.items) > self._batch_items or nbytes > self._batch_bytes:
            await self._written()
            await self._write_large(line)
            return
        self._batch[line.key] = Part(line, line.items)
        self._items += len(line.items)
        self._nbytes += nbytes

    async def _hand_over(self) -> None:
        """Begin to write the batch, once the last one is written."""
        await self._written()
        parts = list(self._batch.values())
        self._batch = {}
        self._items = self._nbytes = 0
        if parts:
            self._writing = asyncio.create_task(self._write(parts), name="import-batch")

    async def _written(self) -> None:
        writing, self._writing = self._writing, None
        if writing is not None:
            await writing

    async def _write(self, parts: Sequence[Part]) -> None:
        outcome = await store(self._database, parts)
        self._count(outcome, len(parts) - outcome.rejected)

    async def _write_large(self, line: Line) -> None:
        floor = start = 0
        for items_ in _cut(line.items, self._batch_items, self._batch_bytes):
            outcome = await store(self._database, [Part(line, items_, start, floor)])
            start += len(items_)
            self._count(outcome, int(start == len(line.items) and not outcome.rejected))
            if outcome.rejected:
                return
            floor = outcome.last

    def _count(self, outcome: Outcome, conversations: int) -> None:
        report = self.report
        report.conversations += conversations
        report.stored += outcome.stored
        report.known += outcome.known
        report.removed += outcome.removed
        report.erased += outcome.erased
        for problem in outcome.problems:
            self._problem(problem)
        self._on_progress(report)

    def _problem(self, problem: Problem) -> None:
        report = self.report
        if problem.kind == "rejected":
            report.rejected += 1
        else:
            report.conflicts += 1
        if len(report.problems) < KEPT_PROBLEMS:
            report.problems.append(problem)
        self._on_problem(problem)


def _cut(items: Sequence[LineItem], most_items: int, most_bytes: int) -> Iterator[Sequence[LineItem]]:
    """Slices within both limits, of one item at least."""
    start = nbytes = 0
    for at, item in enumerate(items):
        if at > start and (at - start == most_items or nbytes + len(item.data) > most_bytes):
            yield items[start:at]
            start, nbytes = at, 0
        nbytes += len(item.data)
    yield items[start:]
