"""Metrics: everything that is defined is exposed, and appends are counted by how they ended."""

from __future__ import annotations

import socket
import threading
import urllib.request
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client import CollectorRegistry, Histogram, generate_latest
from prometheus_client.parser import text_string_to_metric_families

from buffer import __version__, errors
from buffer.metrics import DEFINITIONS, Definition, Metrics, Tally

NAMES = [definition.name for definition in DEFINITIONS]


def touch(metrics: Metrics, definition: Definition) -> None:
    """Give the metric one sample."""
    metric = metrics[definition.name.removeprefix("buffer_")]
    labels = ["x"] * len(definition.labels)
    if isinstance(metric, Tally) and definition.kind == "histogram":
        metric.observe(1, ("x",) * len(definition.labels))
        return
    if isinstance(metric, Tally):
        metric.inc(tuple(labels), 1)
        return
    child = metric.labels(*labels) if labels else metric
    if definition.kind == "histogram":
        child.observe(1)
    else:
        child.inc(1)


def appends(metrics: Metrics, level: str, outcome: str) -> float | None:
    labels = {"path": "stream", "level": level, "outcome": outcome}
    return metrics.registry.get_sample_value("buffer_appends_total", labels)


def samples(registry: CollectorRegistry, name: str) -> dict[tuple[str, Any], float]:
    return {
        (sample.name, sample.labels.get("le")): sample.value
        for family in registry.collect()
        if family.name == name
        for sample in family.samples
        if not sample.name.endswith("_created")
    }


@pytest.mark.parametrize("definition", DEFINITIONS, ids=NAMES)
def test_every_definition_is_exposed_before_anything_happened(definition: Definition) -> None:
    """Help and type of each metric are there from the first scrape on, so that an alert can be written."""
    text = generate_latest(Metrics().registry).decode()
    assert f"# HELP {definition.name} {definition.help}\n" in text
    assert f"# TYPE {definition.name} {definition.kind}\n" in text


@pytest.mark.parametrize("definition", DEFINITIONS, ids=NAMES)
def test_every_definition_takes_samples_with_its_labels(definition: Definition) -> None:
    """One sample each, read back as Prometheus parses it, under the labels that were defined."""
    metrics = Metrics()
    touch(metrics, definition)
    suffix = "_count" if definition.kind == "histogram" else ""
    found = [
        (sample.labels, sample.value)
        for family in text_string_to_metric_families(generate_latest(metrics.registry).decode())
        for sample in family.samples
        if sample.name == definition.name + suffix
    ]
    assert (dict.fromkeys(definition.labels, "x"), 1.0) in found
    assert len(found) == (2 if definition.name == "buffer_build_info" else 1)


def test_build_info_tells_the_version() -> None:
    """It is there from the start."""
    assert f'buffer_build_info{{version="{__version__}"}} 1.0' in generate_latest(Metrics().registry).decode()


def test_names_follow_the_contract() -> None:
    """Prefix, base units, ``_total`` for what only grows; no label whose values grow with the users."""
    assert len(set(NAMES)) == len(NAMES)
    for definition in DEFINITIONS:
        assert definition.name.startswith("buffer_")
        assert definition.name.endswith("_total") == (definition.kind == "counter")
        assert not definition.name.endswith(("_ms", "_milliseconds", "_kb", "_mb", "_kilobytes"))
        assert not {"tenant", "conversation", "user", "item"} & set(definition.labels)
        assert list(definition.buckets) == sorted(set(definition.buckets))
        assert bool(definition.buckets) == (definition.kind == "histogram")


def test_a_name_that_is_not_defined_is_an_error() -> None:
    """A mistyped metric fails where it is used, and does not count into nothing."""
    with pytest.raises(KeyError):
        Metrics()["append_total"]


def test_two_buffers_in_a_process_count_apart() -> None:
    """Each has a registry of its own."""
    one, other = Metrics(), Metrics()
    one.appends.inc(("stream", "buffered", "acked"), 1)
    assert appends(one, "buffered", "acked") == 1
    assert appends(other, "buffered", "acked") is None


@given(
    st.lists(
        st.tuples(
            st.sampled_from(["buffered", "stored"]),
            st.sampled_from(["acked", "duplicate"]),
            st.integers(1, 500),
        ),
        max_size=20,
    )
)
def test_appends_are_counted_by_level_and_outcome(done: list[tuple[str, str, int]]) -> None:
    """The sum of what was counted under each pair, and no sample for a pair that never happened."""
    metrics = Metrics()
    for level, outcome, items in done:
        metrics.appends.inc(("stream", level, outcome), items)
    for level in ("buffered", "stored"):
        for outcome in ("acked", "duplicate"):
            counts = [items for *pair, items in done if pair == [level, outcome]]
            assert appends(metrics, level, outcome) == (sum(counts) if counts else None)


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (errors.Overloaded("full"), "overloaded"),
        (errors.Unavailable("away"), "unavailable"),
        (errors.RedisUnavailable("away"), "unavailable"),
        (errors.PostgresUnavailable("away"), "unavailable"),
        (errors.Conflict("known"), "conflict"),
        (errors.PreconditionFailed("moved", last_position=1), "precondition"),
        (errors.InvalidRequest("wrong"), "invalid"),
        (errors.TooLarge("large"), "invalid"),
        (errors.BufferError("other"), "error"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, Exception) else value,
)
@pytest.mark.parametrize("level", ["buffered", "stored"])
def test_a_rejected_append_is_counted_with_its_reason(level: str, error: Exception, reason: str) -> None:
    """Once as rejected at its level, once under its reason, and under no other."""
    metrics = Metrics()
    metrics.append_failed(level, error)
    assert appends(metrics, level, "rejected") == 1
    assert appends(metrics, level, "unknown") is None
    rejected = {
        sample.labels["reason"]: sample.value
        for family in metrics.registry.collect()
        for sample in family.samples
        if sample.name == "buffer_rejected_total"
    }
    assert rejected == {reason: 1}


def test_an_unknown_outcome_is_not_counted_as_rejected() -> None:
    """It may have been stored: whoever counts rejections must not count it among them."""
    metrics = Metrics()
    metrics.append_failed("stored", errors.OutcomeUnknown("no answer", ids=["m-91"]))
    assert appends(metrics, "stored", "unknown") == 1
    assert appends(metrics, "stored", "rejected") is None
    assert "buffer_rejected_total{" not in generate_latest(metrics.registry).decode()


@given(st.lists(st.floats(0, 10) | st.sampled_from([0.0001, 0.001, 0.0025, 5.0, 5.1]), max_size=30))
def test_append_durations_fall_into_the_buckets_that_the_client_library_chooses(values: list[float]) -> None:
    """The lean histogram of the append path gives the same buckets, count and sum as the library's own."""
    (definition,) = [d for d in DEFINITIONS if d.name == "buffer_append_duration_seconds"]
    metrics, registry = Metrics(), CollectorRegistry()
    reference = Histogram(definition.name, definition.help, registry=registry, buckets=definition.buckets)
    for value in values:
        metrics.append_seconds.observe(value)
        reference.observe(value)
    assert samples(metrics.registry, definition.name) == pytest.approx(samples(registry, definition.name))


def test_metrics_are_served_over_http_until_they_are_stopped() -> None:
    """A scrape gets the counts of this moment; after the end nothing listens and no thread is left."""
    metrics = Metrics()
    threads = threading.active_count()
    port, handle = metrics.serve("127.0.0.1", 0)
    try:
        metrics.appends.inc(("stream", "buffered", "acked"), 7)
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=5) as answer:
            text = answer.read().decode()
    finally:
        metrics.stop_serving(handle)
    assert 'buffer_appends_total{level="buffered",outcome="acked",path="stream"} 7.0' in text
    assert threading.active_count() == threads
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.1", port), timeout=5)
