"""What ``from transmla.convert import …`` gives: see docs/reference/python-api.md."""

from transmla.convert.inspection import Inspection, inspect
from transmla.convert.report import ConversionReport
from transmla.convert.run import convert

__all__ = ["ConversionReport", "Inspection", "convert", "inspect"]
