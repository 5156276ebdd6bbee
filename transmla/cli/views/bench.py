"""A benchmark at the terminal."""

from __future__ import annotations

from itertools import groupby
from pathlib import Path

from rich import box
from rich.table import Table

from transmla.bench.report import BenchCell, BenchReport


def bench_table(report: BenchReport) -> Table:
    """Lay the report out for people, within 80 columns; the speedups are over the source."""
    table = Table(
        title=f"{report.num_new_tokens} new tokens after random ones, {report.dtype}, {report.device} "
        f"({report.machine}, {report.num_threads} threads)",
        box=box.SIMPLE_HEAD,
        title_justify="left",
        pad_edge=False,
        padding=0,
    )
    for heading in ("Context", "Batch"):
        table.add_column(heading, justify="right", no_wrap=True)
    table.add_column("Model", overflow="fold", min_width=12)
    for heading in ("First\ntoken, s", "Speed-\nup", "Decoded\ntokens/s", "Speed-\nup", "KV\nMB", "Peak\nMB"):
        table.add_column(heading, justify="right", no_wrap=True)
    for (context, batch_size), cells in groupby(report.cells, key=lambda cell: (cell.context, cell.batch_size)):
        head = [f"{context:,}", str(batch_size)]
        for cell in cells:
            table.add_row(*head, _name(cell), *_measurements(cell))
            head = ["", ""]
        table.add_section()
    return table


def _name(cell: BenchCell) -> str:
    words = [Path(cell.model).name, *(["absorbed"] if cell.form == "absorbed" else []), cell.problem]
    return ", ".join(word for word in words if word)


def _measurements(cell: BenchCell) -> list[str]:
    if cell.problem is not None:
        return ["-"] * 6
    return [
        _short(cell.seconds_to_first_token),
        _ratio(cell.first_token_speedup),
        _short(cell.decode_tokens_per_second),
        _ratio(cell.decode_speedup),
        _short((cell.cache_bytes or 0) / 1e6),
        _short(max(cell.peak_bytes_first_token or 0, cell.peak_bytes_decode or 0) / 1e6),
    ]


def _ratio(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"


def _short(value: float | None) -> str:
    if value is None:
        return "-"
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"
