"""An evaluation as tables."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from transmla.evaluate.parts import PARTS
from transmla.evaluate.report.report import EvalReport
from transmla.evaluate.report.text_table import Shown, TextTable


def report_tables_of(report: EvalReport) -> Iterator[TextTable]:
    """Yield the tables of each part of the report."""
    shown = report.shown()
    for name, part in PARTS.items():
        yield from part.tables(getattr(report, name), shown)


def tables_of_one(report: EvalReport, number: int) -> Iterator[TextTable]:
    """Yield what the tables say of the source and of the model of that number."""
    whole = report.shown()
    full = (whole.full_names[0], whole.full_names[number])
    # A path of this machine means nothing to others, so a folder is called by its name.
    names = tuple(Path(name).name for name in full)
    sizes = (whole.kv_bytes_per_token[0], whole.kv_bytes_per_token[number])
    shown = Shown(names, full, whole.dtype, sizes)
    for name, part in PARTS.items():
        records = (part.only(record, number, whole.full_names) for record in getattr(report, name))
        yield from part.tables([record for record in records if record is not None], shown)
