"""``transmla finetune``: a converted checkpoint in, a better one out."""

from __future__ import annotations

import sys
from contextlib import redirect_stdout
from pathlib import Path
from typing import Annotated

import typer

from transmla.cli.output import show
from transmla.cli.progress import choose_progress, speaks, warn
from transmla.cli.push import PushToHub, pushing
from transmla.cli.request_options import AsJson, Overwrite, Quiet, Resume, takes_request
from transmla.config import FinetuneRequest


@takes_request("finetune")
def finetune_model(
    request: FinetuneRequest,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Read the data, show the plan with its memory, and stop.")
    ] = False,
    plot: Annotated[Path | None, typer.Option(help="Draw the curves into this file (png, svg or pdf).")] = None,
    resume: Resume = False,
    overwrite: Overwrite = False,
    push_to_hub: PushToHub = None,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Train a converted checkpoint, by default to say what its source says; one GPU, or many with accelerate launch."""
    # Only now: PyTorch and Transformers take seconds to import, and --help must not wait for them.
    from transmla.cli.views.training import plan_table, report_table

    progress = choose_progress(quiet=quiet)
    if plot is not None:
        from transmla.cli.plots import check_plot

        check_plot(plot)
    if dry_run:
        from transmla.finetune.plan import plan_finetune

        plan = plan_finetune(request, overwrite=overwrite)
        for line in plan.not_learnt:
            warn(line)
        show(plan, plan_table, as_json=as_json)
        return

    def tell(line: str) -> None:
        if not quiet:
            print(line, file=sys.stderr)

    # DeepSpeed, where it is installed, says on stdout what it does.
    with redirect_stdout(sys.stderr):
        from transmla.finetune.run import finetune

        with pushing(push_to_hub, request.output_dir, token=request.token):
            report = finetune(request, progress=progress, tell=tell, warn=warn, resume=resume, overwrite=overwrite)
    if plot is not None:
        from transmla.finetune.plot import plot_finetune

        plot_finetune(report, plot)
    # Of several processes, one speaks.
    if speaks():
        show(report, report_table, as_json=as_json)
