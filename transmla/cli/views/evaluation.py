"""An evaluation at the terminal."""

from __future__ import annotations

from collections.abc import Iterator

from rich import box
from rich.table import Table

from transmla.evaluate.report.report import EvalReport
from transmla.evaluate.report.tables import report_tables_of


def report_tables(report: EvalReport) -> Iterator[Table]:
    """Yield a table for each part of the report; they fit 80 columns for a source and three others."""
    for sheet in report_tables_of(report):
        table = Table(
            title=sheet.title, box=box.SIMPLE_HEAD, title_justify="left", pad_edge=False, padding=(0, 1, 0, 0)
        )
        for number, heading in enumerate(sheet.headings):
            table.add_column(heading, justify="right" if number else "left", overflow="fold")
        # Rows without a name belong to the one above.
        grouped = not all(row[0] for row in sheet.rows)
        for row in sheet.rows:
            if grouped and row[0]:
                table.add_section()
            table.add_row(*row)
        yield table
