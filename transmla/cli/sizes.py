"""``transmla sizes``: what each cache size is predicted to cost, before any is converted."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from transmla.cli.output import show
from transmla.cli.progress import choose_progress, warn
from transmla.cli.request_options import AsJson, Quiet, takes_request
from transmla.config import SizesRequest


@takes_request("sizes")
def compare_model_sizes(
    request: SizesRequest,
    plot: Annotated[
        Path | None, typer.Option(help="Draw predicted excess against cache size into this file (png, svg or pdf).")
    ] = None,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Predict the loss that each cache size adds, from one pass over a text: which size to take."""
    # Only now: PyTorch and Transformers take seconds to import, and --help must not wait for them.
    from transmla.cli.plots import check_plot
    from transmla.cli.views.sizes import sizes_view
    from transmla.convert.size_plot import plot_sizes
    from transmla.convert.size_table import compare_sizes
    from transmla.device import reuse_memory

    if plot is not None:
        check_plot(plot)
    reuse_memory()
    report = compare_sizes(request, progress=choose_progress(quiet=quiet), tell=warn)
    if plot is not None:
        plot_sizes(report, plot)
    show(report, sizes_view, as_json=as_json)
