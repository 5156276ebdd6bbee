"""``transmla verify``: whether a checkpoint is whole, and computes what its source computes."""

from __future__ import annotations

import typer

from transmla.cli.output import show
from transmla.cli.progress import choose_progress
from transmla.cli.request_options import AsJson, Quiet, takes_request
from transmla.config import VerifyRequest


@takes_request("verify")
def verify_model(request: VerifyRequest, as_json: AsJson = False, quiet: Quiet = False) -> None:
    """Check a checkpoint: files, shapes, values, checksums, and with its source the logits; 1 if one fails."""
    # Only now: PyTorch and Transformers take seconds to import, and --help must not wait for them.
    from transmla.cli.views.verification import verification_table
    from transmla.verify.run import verify

    verification = verify(request, progress=choose_progress(quiet=quiet))
    show(verification, verification_table, as_json=as_json)
    if not verification.passed:
        raise typer.Exit(1)
