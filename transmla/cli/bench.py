"""``transmla bench``: how fast the converted models are, and what memory they take, compared with their source."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from transmla.cli.output import show
from transmla.cli.progress import choose_progress
from transmla.cli.request_options import AsJson, Quiet, takes_request
from transmla.config import BenchRequest


@takes_request("bench")
def bench_models(
    request: BenchRequest,
    plot: Annotated[Path | None, typer.Option(help="Draw speed and memory into this file (png, svg or pdf).")] = None,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Measure time to first token, decoding speed, KV cache and peak memory of a source and its conversions."""
    # Only now: PyTorch and Transformers take seconds to import, and --help must not wait for them.
    from transmla.bench.plot import plot_bench
    from transmla.bench.run import bench
    from transmla.cli.plots import check_plot
    from transmla.cli.views.bench import bench_table

    if plot is not None:
        check_plot(plot)
    report = bench(request, progress=choose_progress(quiet=quiet))
    if plot is not None:
        plot_bench(report, plot)
    show(report, bench_table, as_json=as_json)
