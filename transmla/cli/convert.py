"""``transmla convert``: a GQA checkpoint in, an MLA checkpoint out."""

from __future__ import annotations

from typing import Annotated

import typer

from transmla.cli.output import show
from transmla.cli.progress import choose_progress, warn
from transmla.cli.push import PushToHub, pushing
from transmla.cli.request_options import AsJson, Overwrite, Quiet, Resume, takes_request
from transmla.config import ConvertRequest


@takes_request("convert")
def convert_model(
    request: ConvertRequest,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Stop at the plan; with text, predict errors first.")
    ] = False,
    resume: Resume = False,
    overwrite: Overwrite = False,
    push_to_hub: PushToHub = None,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Convert a grouped-query attention checkpoint into a native DeepSeek-V3 one."""
    # Only now: PyTorch and Transformers take seconds to import, and --help must not wait for them.
    from transmla.cli.views.plan import plan_table, report_table
    from transmla.convert.run import convert, prepare
    from transmla.device import reuse_memory

    reuse_memory()
    progress = choose_progress(quiet=quiet)
    if dry_run:
        plan, _ = prepare(request, progress=progress, overwrite=overwrite, tell=warn)
        show(plan.summary, plan_table, as_json=as_json)
        return
    with pushing(push_to_hub, request.output_dir, token=request.token):
        report = convert(request, progress=progress, resume=resume, overwrite=overwrite, tell=warn)
    show(report, report_table, as_json=as_json)
