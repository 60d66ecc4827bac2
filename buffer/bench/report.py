"""Results and how they are printed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from statistics import median
from typing import Any, Literal


@dataclass(slots=True, frozen=True)
class Result:
    """One figure: the median of ours and of the baseline, and of their ratio, against its target."""

    name: str
    unit: str
    ours: float
    baseline: float | None
    baseline_name: str
    ratio: float
    target: float
    goal: float | None
    better: Literal["higher", "lower"]

    @property
    def met(self) -> bool:
        """Whether the target is met."""
        return self.ratio >= self.target if self.better == "higher" else self.ratio <= self.target

    def to_dict(self) -> dict[str, Any]:
        """For ``--json``."""
        return {**asdict(self), "met": self.met}


def compare(
    name: str,
    unit: str,
    pairs: Sequence[tuple[float, float]],
    baseline_name: str,
    *,
    target: float,
    goal: float | None,
    better: Literal["higher", "lower"],
) -> Result:
    """The result of rounds, each (ours, baseline)."""
    return Result(
        name,
        unit,
        median(ours for ours, _ in pairs),
        median(baseline for _, baseline in pairs),
        baseline_name,
        median(ours / baseline for ours, baseline in pairs),
        target,
        goal,
        better,
    )


def render(results: Sequence[Result]) -> str:
    """A table for people."""
    lines = [f"{'':<48} {'ours':>10} {'baseline':>10} {'ratio':>7} {'target':>8} {'goal':>6}"]
    for r in results:
        sign = "≥" if r.better == "higher" else "≤"
        baseline = f"{r.baseline:,.4g}" if r.baseline is not None else ""
        if r.baseline is not None and r.baseline >= 1000:
            baseline = f"{r.baseline:,.0f}"
        ours = f"{r.ours:,.0f}" if r.ours >= 1000 else f"{r.ours:,.4g}"
        goal = f"{r.goal:g}" if r.goal is not None else ""
        target = f"{sign}{r.target:g}"
        lines.append(
            f"{f'{r.name}, {r.unit}':<48} {ours:>10} {baseline:>10} {r.ratio:>7.2f} {target:>8} "
            f"{goal:>6}  {'met' if r.met else 'MISSED'}"
        )
        if r.baseline_name:
            lines.append(f"    beside {r.baseline_name}")
    return "\n".join(lines)
