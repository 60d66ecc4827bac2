"""The worker: makes the summaries that are due, a few at a time, beside a flusher.

Invariants:

* No lock and no transaction is open while a summarizer is at work, and nobody waits for one.
* A summary is written in one transaction, if what it was made from is still what the conversation holds;
  otherwise it is made again. So two workers, or one that was stopped and woke up, cannot do harm.
* Whatever goes wrong, the conversation stays in the queue until a summary is made or none is due.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Container, Iterable

import anyio

from buffer.errors import BufferError
from buffer.metrics import Metrics
from buffer.model.ids import conversation_key, shard_of
from buffer.model.types import Summary
from buffer.policy.backoff import full_jitter
from buffer.settings import Settings
from buffer.store.pool import Database
from buffer.store.shards import Owned
from buffer.store.summaries import Job, Part, SummaryQueue, SummaryStore
from buffer.summaries.counts import Counts
from buffer.summaries.summarizer import Summarizer, SummaryFailed
from buffer.summaries.text import cut_to_bytes, encodable

_log = logging.getLogger(__name__)

# Called after a summary was committed, by (tenant, conversation, summary).
OnSummary = Callable[[str, str, Summary], Awaitable[None]]

# One call of the summarizer gets no more; a long conversation is covered in several steps.
MOST_ITEMS = 200
MOST_BYTES = 256 << 10

# Calls of the summarizer at a time; each uses one connection between calls, and the queue another one.
CONCURRENCY = 4
CONNECTIONS = CONCURRENCY + 1

_LOOK_UP_AT_A_TIME = 1_000
_POLL_SECONDS = 1.0
_RETRY_FIRST_SECONDS = 0.5
_RETRY_MOST_SECONDS = 60.0
_RELEASE_SECONDS = 1.0
# After a flush that left something behind, summaries wait for so long.
_BEHIND_SECONDS = 0.5


class SummaryWorker:
    """Makes the summaries of one flusher process. ``database`` is its own, with `CONNECTIONS`."""

    def __init__(
        self,
        settings: Settings,
        database: Database,
        summarizer: Summarizer,
        metrics: Metrics,
        name: str,
        on_summary: OnSummary,
    ) -> None:
        self._settings = settings
        self._store = SummaryStore(database)
        self._queue = SummaryQueue(database)
        self._summarizer = summarizer
        self._metrics = metrics
        self._on_summary = on_summary
        self._owners = [f"{name}/{number}" for number in range(CONCURRENCY)]
        self._lease_seconds = settings.summarizer_timeout_seconds + settings.lease_seconds
        keep = settings.summary_keep_items
        self._counts = Counts(keep + settings.summary_every_items, keep)
        self._behind_until = 0.0
        self._something_to_look_up = asyncio.Event()
        self._something_due = asyncio.Event()

    def committed(self, owned: Owned, keys: Iterable[bytes], changed: Container[bytes], behind: bool) -> None:
        """Called after each flush: items by their conversation's key; ``changed`` had items removed.

        ``behind``: the flusher has more to do; summaries wait.
        """
        self._counts.add(owned, keys, changed)
        if behind:
            self._behind_until = time.monotonic() + _BEHIND_SECONDS
        if self._counts.waiting:
            self._something_to_look_up.set()

    async def run(self) -> None:
        """Work until cancelled; then what is under way is left to others."""
        try:
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(self._look_up)
                for owner in self._owners:
                    tasks.start_soon(self._work, owner)
        finally:
            with anyio.move_on_after(_RELEASE_SECONDS, shield=True):
                try:
                    await self._queue.release(self._owners)
                except BufferError as error:
                    _log.debug("summaries under way are left to their lease: %s", error)

    # --- finding work

    async def _look_up(self) -> None:
        failures = 0
        while True:
            await self._something_to_look_up.wait()
            await self._let_the_flusher_go_first()
            taken = self._counts.take(_LOOK_UP_AT_A_TIME)
            if not taken:
                self._something_to_look_up.clear()
                continue
            try:
                await self._queue_those_due(taken)
                failures = 0
            except Exception as error:  # noqa: BLE001 - as below
                self._counts.put_back(taken)
                _log.warning("due summaries cannot be queued yet: %s", error)
                failures += 1
                await asyncio.sleep(full_jitter(failures, _RETRY_FIRST_SECONDS, _RETRY_MOST_SECONDS))

    async def _queue_those_due(self, taken: dict[bytes, tuple[int, int]]) -> None:
        conversations = [_split(key) for key in taken]
        uncovered = await self._queue.add(conversations, self._counts.enough)
        self._counts.learn(
            taken, {conversation_key(*conversation).encode(): n for conversation, n in uncovered.items()}
        )
        if any(count >= self._counts.enough for count in uncovered.values()):
            self._something_due.set()

    # --- doing it

    async def _work(self, owner: str) -> None:
        failures = 0
        while True:
            await self._let_the_flusher_go_first()
            try:
                job = await self._queue.claim(owner, self._lease_seconds)
                if job is None:
                    await self._wait_for_work()
                    continue
                failures = 0 if await self._do(job) else failures + 1
            except Exception as error:  # noqa: BLE001 - whatever it is, it must not stop the flusher
                _log.warning("a summary cannot be made now: %s", error)
                failures += 1
            if failures:  # the endpoint, or Postgres, is not to be asked in a loop
                await asyncio.sleep(full_jitter(failures, _RETRY_FIRST_SECONDS, _RETRY_MOST_SECONDS))

    async def _let_the_flusher_go_first(self) -> None:
        """A summary costs as much of both processors as hundreds of flushed items."""
        while (seconds := self._behind_until - time.monotonic()) > 0:
            await asyncio.sleep(seconds)

    async def _wait_for_work(self) -> None:
        with anyio.move_on_after(_POLL_SECONDS):
            await self._something_due.wait()
        self._something_due.clear()

    async def _do(self, job: Job) -> bool:
        """Bring a conversation's summary up to where it should be; False if that failed."""
        settings = self._settings
        shard = shard_of(conversation_key(job.tenant, job.conversation), settings.shards)
        whole, target = await self._store.target(
            job.tenant, job.conversation, shard, settings.summary_keep_items, settings.summary_every_items
        )
        try:
            if not whole:
                raise _NotNow("postponed")  # noqa: TRY301
            while target is not None and await self._step(job, shard, target):
                if not await self._queue.renew(job, self._lease_seconds):
                    return True
        except _NotNow as why:
            await self._postpone(job, why.outcome)
            return True
        except SummaryFailed as error:
            _log.warning("%s made no summary, will be asked again: %s", self._summarizer.name, error)
            await self._postpone(job, "failed")
            return False
        await self._queue.finish(job)
        return True

    async def _step(self, job: Job, shard: int, target: int) -> bool:
        """One summary; whether there is more to cover.

        Raises:
            SummaryFailed: the summarizer has none to give.
            _NotNow: the conversation changed meanwhile.
        """
        part = await self._store.part(job.tenant, job.conversation, target, MOST_ITEMS, MOST_BYTES)
        if not part.items:
            return False
        text = await self._summarize(part)
        name = self._summarizer.name
        summary = await self._store.write(job.tenant, job.conversation, shard, part, text, name)
        if summary is None:
            raise _NotNow("discarded")
        self._metrics["summaries_total"].labels(outcome="made").inc()
        await self._on_summary(job.tenant, job.conversation, summary)
        return summary.through < target

    async def _summarize(self, part: Part) -> str:
        began = time.perf_counter()
        previous = part.previous.text if part.previous else None
        try:
            async with asyncio.timeout(self._settings.summarizer_timeout_seconds):
                text = await self._summarizer.summarize(previous, part.items)
        except SummaryFailed:
            raise
        except TimeoutError as error:
            raise SummaryFailed("it took too long") from error
        except Exception as error:  # it may be the application's own: anything can happen in it
            _log.debug("a summarizer failed", exc_info=True)
            raise SummaryFailed(type(error).__name__) from error
        finally:
            self._metrics["summary_duration_seconds"].observe(time.perf_counter() - began)
        if not isinstance(text, str) or not text.strip():
            raise SummaryFailed("its text is empty")
        return cut_to_bytes(encodable(text), self._settings.summary_max_bytes)

    async def _postpone(self, job: Job, outcome: str) -> None:
        self._metrics["summaries_total"].labels(outcome=outcome).inc()
        seconds = full_jitter(job.failures + 1, _RETRY_FIRST_SECONDS, _RETRY_MOST_SECONDS)
        await self._queue.postpone(job, seconds)


class _NotNow(Exception):
    """Postgres lacks items of the conversation, or it changed meanwhile: it is looked at again later."""

    def __init__(self, outcome: str) -> None:
        super().__init__(outcome)
        self.outcome = outcome


def _split(key: bytes) -> tuple[str, str]:
    tenant, conversation = key.decode().split("/")
    return tenant, conversation
