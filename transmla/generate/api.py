"""What ``from transmla.generate import …`` gives: see docs/reference/python-api.md."""

from transmla.generate.report import GenerationReport
from transmla.generate.run import generate

__all__ = ["GenerationReport", "generate"]
