"""What ``from transmla.evaluate import …`` gives: see docs/reference/python-api.md."""

from transmla.evaluate.report.report import EvalReport
from transmla.evaluate.run import evaluate

__all__ = ["EvalReport", "evaluate"]
