"""``transmla verify``: is a checkpoint whole, and does it say what its source says?"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer
from rich import box
from rich.console import Console
from rich.table import Table

from transmla.cli.progress import choose_progress
from transmla.config import VerifyRequest

if TYPE_CHECKING:
    from transmla.verify.report import Verification

_help = VerifyRequest.describe
_MARKS = {"passed": "[green]passed[/]", "failed": "[red]failed[/]", "skipped": "skipped"}


def verify_model(
    model: Annotated[str | None, typer.Argument(help=_help("model"))] = None,
    source: Annotated[str | None, typer.Option(help=_help("source"))] = None,
    gguf_file: Annotated[str | None, typer.Option(help=_help("gguf_file"))] = None,
    revision: Annotated[str | None, typer.Option(help=_help("revision"))] = None,
    token: Annotated[str | None, typer.Option(help=_help("token"))] = None,
    device: Annotated[str | None, typer.Option(help=_help("device"))] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the checks as JSON.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Show no progress.")] = False,
) -> None:
    """Check a checkpoint: files, shapes, values, checksums, and beside its source the logits; 1 if one fails."""
    request = VerifyRequest.build(recipe=None, flags=locals())

    # Only now: PyTorch and Transformers take seconds to import, and --help must not wait for them.
    from transmla.verify.run import verify

    verification = verify(request, progress=choose_progress(quiet=quiet))
    print(verification.model_dump_json(indent=2)) if as_json else Console().print(verification_table(verification))
    if not verification.passed:
        raise typer.Exit(1)


def verification_table(verification: Verification) -> Table:
    """Lay the checks out for people."""
    table = Table(title=verification.model, box=box.SIMPLE_HEAD, title_justify="left", pad_edge=False)
    table.add_column("Check", no_wrap=True)
    table.add_column("", no_wrap=True)
    table.add_column("Found", overflow="fold")
    for check in verification.checks:
        table.add_row(check.name, _MARKS[check.outcome], check.found)
    return table
