"""What was checked of a checkpoint, at the terminal."""

from __future__ import annotations

from rich import box
from rich.table import Table

from transmla.verify.report import Verification

_MARKS = {"passed": "[green]passed[/]", "failed": "[red]failed[/]", "skipped": "skipped"}


def verification_table(verification: Verification) -> Table:
    """Lay the checks out for people."""
    table = Table(title=verification.model, box=box.SIMPLE_HEAD, title_justify="left", pad_edge=False)
    table.add_column("Check", no_wrap=True)
    table.add_column("", no_wrap=True)
    table.add_column("Found", overflow="fold")
    for check in verification.checks:
        table.add_row(check.name, _MARKS[check.outcome], check.found)
    return table
