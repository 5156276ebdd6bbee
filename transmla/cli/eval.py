"""``transmla eval``: how good the converted models are, compared with their source."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from transmla.cli.output import show
from transmla.cli.progress import choose_progress, warn
from transmla.cli.request_options import AsJson, Quiet, takes_request
from transmla.config import EvalRequest


@takes_request("eval")
def evaluate_models(
    request: EvalRequest,
    report: Annotated[
        Path | None, typer.Option(help="Write tables and plots into this HTML file, which needs nothing else.")
    ] = None,
    update_card: Annotated[
        bool, typer.Option("--update-card", help="Write the numbers into the model cards of the converted folders.")
    ] = False,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Measure how good converted models are, compared with their source."""
    # Only now: PyTorch and Transformers take seconds to import, and --help must not wait for them.
    from transmla.cli.plots import check_plots, check_writable
    from transmla.cli.views.evaluation import report_tables
    from transmla.evaluate.report.html import write_html
    from transmla.evaluate.report.model_card import check_cards, update_cards
    from transmla.evaluate.run import evaluate

    if report is not None:
        check_plots("--report")
        check_writable(report, "--report")
    if update_card:
        check_cards(request.converted)
    found = evaluate(request, progress=choose_progress(quiet=quiet), tell=warn)
    if report is not None:
        write_html(found, report)
    if update_card:
        update_cards(found)
    show(found, report_tables, as_json=as_json)
