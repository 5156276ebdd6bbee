"""An evaluation as plots."""

from __future__ import annotations

from collections.abc import Iterator

from transmla.evaluate.parts import PARTS
from transmla.evaluate.report.report import EvalReport


def report_plots(report: EvalReport) -> Iterator[tuple[str, str]]:
    """Yield a title and an SVG for each plot of the parts."""
    shown = report.shown()
    for name, part in PARTS.items():
        yield from part.plots(getattr(report, name), shown)
