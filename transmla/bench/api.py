"""What ``from transmla.bench import …`` gives: see docs/reference/python-api.md."""

from transmla.bench.report import BenchReport
from transmla.bench.run import bench

__all__ = ["BenchReport", "bench"]
