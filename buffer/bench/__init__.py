"""``buffer bench``: this package beside its baselines, in one run, interleaved.

Machines differ and are noisy, so what counts is the ratio: each round measures ours and the baseline one
right after the other, and the median of the rounds' ratios is reported. Items have 400 bytes and go to
1,000 conversations. Servers are started for the run and removed after it.
"""

from buffer.bench.report import Result, render
from buffer.bench.run import SUITES, run_suites

__all__ = ["SUITES", "Result", "render", "run_suites"]
