"""The main job with its proof: append, kill Redis, start it again, flush, and count what is in Postgres."""

from buffer.demo.demo import DemoReport, run_demo

__all__ = ["DemoReport", "run_demo"]
