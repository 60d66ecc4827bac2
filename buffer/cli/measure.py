"""``buffer demo`` and ``buffer bench``."""

from __future__ import annotations

from typing import Annotated, Literal

from cyclopts import Parameter

from buffer.cli.common import EXIT_FAILED, note, print_json, run, set_up_logging
from buffer.demo import DemoReport, run_demo


def demo(
    *,
    seconds: Annotated[float, Parameter(help="How long the writers write.")] = 6.0,
    json: Annotated[bool, Parameter(negative="")] = False,
    plant: Annotated[
        Literal["lost"] | None, Parameter(help="Remove an acked row before the count: the demo must fail.")
    ] = None,
) -> int:
    """Append from many writers, kill Redis in the middle, start it again, flush, and count.

    Exits 1 unless everything that was acked is in Postgres, once and in order.
    """
    set_up_logging("critical")
    report = run(lambda: run_demo(seconds, say=note, plant=plant))
    if json:
        print_json(report.to_dict())
    else:
        print(_lines(report))
    return 0 if report.ok else EXIT_FAILED


def _lines(report: DemoReport) -> str:
    verdict = "PASSED: nothing acked was lost" if report.ok else "FAILED"
    return f"""
  appended      {report.appended:>9,}
  acked         {report.acked:>9,}   ({report.retried} attempts repeated under the same id)
  in Postgres   {report.in_postgres:>9,}   ({report.appended_without_redis:,} appended while Redis was away)
  missing       {report.missing:>9,}
  duplicated    {report.duplicated:>9,}
  out of order  {report.out_of_order:>9,}

  append        p50 {report.append_p50_ms:.2f} ms, p99 {report.append_p99_ms:.2f} ms, \
longest {report.longest_append_seconds:.2f} s (Redis was away for {report.without_redis_seconds:.2f} s)
  flush lag     {report.flush_lag_max_seconds:.2f} s at most

  {verdict}"""


def bench(
    *suites: Annotated[
        Literal["append", "flush", "memory", "backlog", "retention", "read", "views", "hits"],
        Parameter(help="Which; all by default."),
    ],
    rounds: Annotated[int, Parameter(help="Interleaved rounds; the median of their ratios counts.")] = 5,
    redis_from_path: Annotated[
        bool, Parameter(negative="", help="Measure with redis-server or valkey-server from PATH.")
    ] = False,
    json: Annotated[bool, Parameter(negative="")] = False,
) -> None:
    """Measure appends, flushes, reads and memory, each beside its baseline in the same run."""
    from buffer.bench import SUITES, render, run_suites  # noqa: PLC0415 - slow to import, and rarely used

    set_up_logging("error")
    results = run(
        lambda: run_suites(suites or tuple(SUITES), rounds=rounds, redis_from_path=redis_from_path, say=note)
    )
    if json:
        print_json([result.to_dict() for result in results])
    else:
        print(render(results))
