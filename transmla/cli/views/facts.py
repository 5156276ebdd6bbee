"""What the tables of several commands are made of."""

from __future__ import annotations

from rich import box
from rich.table import Table


def facts_table(title: str) -> Table:
    """Start a table of one fact a row."""
    table = Table(title=title, box=box.SIMPLE, show_header=False, title_justify="left", pad_edge=False)
    table.add_column("", style="bold", no_wrap=True)
    table.add_column("", overflow="fold")
    return table


def readable_bytes(count: int) -> str:
    """Write a number of bytes as people do."""
    size = float(count)
    for unit in ("B", "kB", "MB", "GB"):
        if size < 1000:
            return f"{size:.3g} {unit}"
        size /= 1000
    return f"{size:.3g} TB"


def share(part: float) -> str:
    """Write a share of a whole, small ones with a digit more."""
    return f"{part:.0%}" if part >= 0.1 else f"{part:.1%}"
