"""All metrics, defined in one place. Base units; no tenant or conversation labels."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterator
from itertools import accumulate
from typing import Any, Literal, NamedTuple

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, start_http_server
from prometheus_client.core import CounterMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector

from buffer.errors import (
    Conflict,
    InvalidRequest,
    OutcomeUnknown,
    Overloaded,
    PreconditionFailed,
    Unavailable,
)
from buffer.version import __version__


class Definition(NamedTuple):
    """One metric as it is exposed."""

    kind: Literal["counter", "gauge", "histogram"]
    name: str
    help: str
    labels: tuple[str, ...] = ()
    buckets: tuple[float, ...] = ()


_SECONDS = (0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5)
_TURNS = (1, 10, 100, 500, 1_000, 2_500, 5_000, 10_000, 25_000)

DEFINITIONS: tuple[Definition, ...] = (
    # --- append: in every process that accepts items
    Definition(
        "counter", "buffer_appends_total", "Items by how their append ended.", ("path", "level", "outcome")
    ),
    Definition(
        "histogram", "buffer_append_duration_seconds", "Append, from call to receipt.", buckets=_SECONDS
    ),
    Definition("gauge", "buffer_append_queue_depth", "Appends that wait for Redis in this process."),
    Definition("gauge", "buffer_retained_turns", "Items that this process holds until they are in Postgres."),
    Definition("gauge", "buffer_retained_bytes", "What they take in memory, estimated."),
    Definition(
        "counter",
        "buffer_spilled_turns_total",
        "Retained items that this process wrote to Postgres when the path closed, and that were not there.",
    ),
    Definition(
        "gauge",
        "buffer_degraded",
        "1 while the service, or this process, goes on without it.",
        ("dependency",),
    ),
    Definition("counter", "buffer_rejected_total", "Appends that were turned away.", ("reason",)),
    # --- flush: in every flusher
    Definition(
        "gauge",
        "buffer_oldest_unflushed_age_seconds",
        "Age of the oldest unflushed item, 0 for none.",
        ("shard",),
    ),
    Definition("gauge", "buffer_unflushed_turns", "Items in the shard's stream.", ("shard",)),
    Definition("gauge", "buffer_unflushed_bytes", "Bytes of unflushed items in this flusher's shards."),
    Definition("gauge", "buffer_shard_owned", "1 if this process flushes the shard.", ("shard",)),
    Definition(
        "histogram", "buffer_flush_duration_seconds", "One flush, from fetch to commit.", buckets=_SECONDS
    ),
    Definition("histogram", "buffer_flush_batch_turns", "Items a flush.", buckets=_TURNS),
    Definition("counter", "buffer_flushed_turns_total", "Items committed in Postgres by this process."),
    Definition(
        "counter", "buffer_flush_failures_total", "Flushes that failed, to be tried again.", ("reason",)
    ),
    Definition(
        "counter", "buffer_fenced_flushes_total", "Flushes refused because the shard has a new owner."
    ),
    Definition(
        "counter", "buffer_repeated_turns_total", "Items left out because their id was stored already."
    ),
    Definition(
        "counter", "buffer_dead_lettered_turns_total", "Items that this process moved to the dead letters."
    ),
    Definition(
        "gauge", "buffer_last_flush_success_timestamp_seconds", "When a flush last committed here, Unix time."
    ),
    Definition(
        "histogram",
        "buffer_read_duration_seconds",
        "Reads, by where the answer came from.",
        ("source",),
        _SECONDS,
    ),
    # --- summaries: in every flusher, where a summarizer is set
    Definition(
        "counter",
        "buffer_summaries_total",
        "Summaries: made; or failed, postponed (Postgres lacks items), discarded (the conversation changed), "
        "to be tried again.",
        ("outcome",),
    ),
    Definition(
        "histogram",
        "buffer_summary_duration_seconds",
        "One call of the summarizer.",
        buckets=(*_SECONDS, 10, 30, 60),
    ),
    # --- events: in every process with listeners
    Definition("gauge", "buffer_event_listeners", "Listeners to events in this process."),
    Definition("gauge", "buffer_event_followers", "Shards whose stream is read for them."),
    Definition(
        "counter", "buffer_slow_listeners_total", "Listeners that did not take events as fast as they came."
    ),
    # --- kept in Postgres, so that they outlive every process; each flusher tells them
    Definition("counter", "buffer_lost_turns_total", "Items that were lost, or may have been."),
    Definition(
        "counter",
        "buffer_incarnation_changes_total",
        "Times that a store was found to be another one, or an older one, than before.",
        ("store",),
    ),
    Definition(
        "counter",
        "buffer_cache_requests_total",
        "Reads of cached context by how they ended: `hit`, `shared` (somebody else filled it), `miss` (filled"
        " by this read), `beyond` (more than the cache holds).",
        ("type", "tier", "outcome"),
    ),
    Definition("counter", "buffer_swept_views_total", "Views dropped early, to make room in Redis."),
    Definition("gauge", "buffer_dead_letter_turns", "Dead letters that wait for somebody to act."),
    Definition("gauge", "buffer_missing_processes", "Silent processes that may hold acked items."),
    # --- everywhere
    Definition("gauge", "buffer_redis_memory_bytes", "Memory that Redis uses, as this process saw it last."),
    Definition(
        "gauge",
        "buffer_seconds_to_full",
        "When the first high-water mark is reached at the present rates; +Inf while it is not nearing.",
    ),
    Definition("gauge", "buffer_build_info", "1; the label tells the version.", ("version",)),
    Definition("gauge", "buffer_schema_version", "Version of the database's schema."),
)


class Tally(Collector):
    """A counter or histogram of plain integers, turned into samples at a scrape.

    For the append path, since the client library's objects lock and cost 1 to 2 us each time, a tenth of
    an append; and for counts that are kept elsewhere.
    """

    def __init__(self, definition: Definition) -> None:
        self._definition = definition
        self._counts: dict[tuple[str, ...], int] = {}
        self._bounds = definition.buckets
        self._buckets: dict[tuple[str, ...], list[int]] = {}
        self._sums: dict[tuple[str, ...], float] = {}
        if definition.kind == "histogram" and not definition.labels:
            self.observe(0.0, amount=0)

    def inc(self, labels: tuple[str, ...], amount: int) -> None:
        """Count under these label values."""
        self._counts[labels] = self._counts.get(labels, 0) + amount

    def set_total(self, labels: tuple[str, ...], total: int) -> None:
        """Take over a count that is kept elsewhere."""
        self._counts[labels] = total

    def observe(self, value: float, labels: tuple[str, ...] = (), amount: int = 1) -> None:
        """Put a value into its bucket."""
        try:
            self._buckets[labels][bisect_left(self._bounds, value)] += amount
            self._sums[labels] += value
        except KeyError:
            self._sums[labels] = 0.0
            self._buckets[labels] = [0] * (len(self._bounds) + 1)
            self.observe(value, labels, amount)

    def collect(self) -> Iterator[Metric]:
        """The samples, as the client library asks for them."""
        definition = self._definition
        if definition.kind == "counter":
            counter = CounterMetricFamily(definition.name, definition.help, labels=definition.labels)
            for labels, count in self._counts.copy().items():  # a scrape runs in a thread of its own
                counter.add_metric(labels, count)
            yield counter
            return
        histogram = HistogramMetricFamily(definition.name, definition.help, labels=definition.labels)
        bounds = [*map(str, map(float, definition.buckets)), "+Inf"]
        for labels, counts in self._buckets.copy().items():
            buckets = list(zip(bounds, accumulate(counts), strict=True))
            histogram.add_metric(labels, buckets, self._sums[labels])
        yield histogram


_TALLIES = {
    "buffer_appends_total",
    "buffer_append_duration_seconds",
    "buffer_read_duration_seconds",
    "buffer_cache_requests_total",
    "buffer_lost_turns_total",
    "buffer_incarnation_changes_total",
}
_KINDS: dict[str, type[Counter | Gauge | Histogram]] = {
    "counter": Counter,
    "gauge": Gauge,
    "histogram": Histogram,
}


class Metrics:
    """The metrics of one `Buffer` or flusher, in a registry of its own."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self._metrics: dict[str, Any] = {}
        for definition in DEFINITIONS:
            if definition.name in _TALLIES:
                tally = Tally(definition)
                self.registry.register(tally)
                self._metrics[definition.name] = tally
                continue
            options: dict[str, Any] = {"buckets": definition.buckets} if definition.buckets else {}
            self._metrics[definition.name] = _KINDS[definition.kind](
                definition.name, definition.help, definition.labels, registry=self.registry, **options
            )
        self["build_info"].labels(version=__version__).set(1)
        self.append_seconds: Tally = self["append_duration_seconds"]
        self.appends: Tally = self["appends_total"]

    def __getitem__(self, name: str) -> Any:
        """The metric ``buffer_<name>``."""
        return self._metrics[f"buffer_{name}"]

    def append_failed(self, level: str, error: Exception) -> None:
        """Count an append that was not acked."""
        if isinstance(error, OutcomeUnknown):
            self.appends.inc(("stream", level, "unknown"), 1)
            return
        self.appends.inc(("stream", level, "rejected"), 1)
        reasons: list[tuple[type[Exception], str]] = [
            (Overloaded, "overloaded"),
            (Unavailable, "unavailable"),
            (Conflict, "conflict"),
            (PreconditionFailed, "precondition"),
            (InvalidRequest, "invalid"),
        ]
        reason = next((name for kind, name in reasons if isinstance(error, kind)), "error")
        self["rejected_total"].labels(reason=reason).inc()

    def serve(self, host: str, port: int) -> tuple[int, Any]:
        """Expose the metrics over HTTP; the port in use and a handle for `stop_serving`."""
        server, thread = start_http_server(port, host, registry=self.registry)
        return server.server_port, (server, thread)

    @staticmethod
    def stop_serving(handle: Any) -> None:
        """Stop what `serve` started."""
        server, thread = handle
        server.shutdown()
        server.server_close()
        thread.join()
