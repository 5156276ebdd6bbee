"""``transmla bench``: how fast the converted models are, and what memory they take, beside their source."""

from __future__ import annotations

from itertools import groupby
from pathlib import Path
from typing import Annotated

import typer
from rich import box
from rich.console import Console
from rich.table import Table

from transmla.bench.report import BenchCell, BenchReport
from transmla.cli.progress import choose_progress
from transmla.config import BenchRequest

_help = BenchRequest.describe


def bench_models(
    source: Annotated[str | None, typer.Argument(help=_help("source"))] = None,
    converted: Annotated[list[str] | None, typer.Argument(help=_help("converted"))] = None,
    contexts: Annotated[list[str] | None, typer.Option(help=_help("contexts"))] = None,
    batch_sizes: Annotated[list[str] | None, typer.Option(help=_help("batch_sizes"))] = None,
    num_new_tokens: Annotated[int | None, typer.Option(help=_help("num_new_tokens"))] = None,
    num_rounds: Annotated[int | None, typer.Option(help=_help("num_rounds"))] = None,
    seed: Annotated[int | None, typer.Option(help=_help("seed"))] = None,
    dtype: Annotated[str | None, typer.Option(help=_help("dtype"))] = None,
    device: Annotated[str | None, typer.Option(help=_help("device"))] = None,
    gguf_file: Annotated[str | None, typer.Option(help=_help("gguf_file"))] = None,
    revision: Annotated[str | None, typer.Option(help=_help("revision"))] = None,
    token: Annotated[str | None, typer.Option(help=_help("token"))] = None,
    config: Annotated[Path | None, typer.Option(help="YAML recipe; flags win over it.")] = None,
    plot: Annotated[Path | None, typer.Option(help="Draw speed and memory into this file (png, svg or pdf).")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the report as JSON.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Show no progress.")] = False,
) -> None:
    """Measure time to first token, decoding speed, KV cache and peak memory of a source and its conversions."""
    request = BenchRequest.build(recipe=config, flags=locals())

    # Only now: PyTorch and Transformers take seconds to import, and --help must not wait for them.
    from transmla.bench.plot import plot_bench
    from transmla.bench.run import bench
    from transmla.cli.plots import check_plot

    if plot is not None:
        check_plot(plot)
    report = bench(request, progress=choose_progress(quiet=quiet))
    if plot is not None:
        plot_bench(report, plot)
    if as_json:
        print(report.model_dump_json(indent=2))
    else:
        Console().print(bench_table(report))


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
