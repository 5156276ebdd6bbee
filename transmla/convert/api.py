"""What ``from transmla.convert import …`` gives: see docs/reference/python-api.md."""

from transmla.convert.inspection import Inspection, inspect
from transmla.convert.report import ConversionReport
from transmla.convert.run import convert
from transmla.convert.size_table import SizesReport, compare_sizes

__all__ = ["ConversionReport", "Inspection", "SizesReport", "compare_sizes", "convert", "inspect"]
