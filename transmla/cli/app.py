"""The ``transmla`` command: one file per subcommand, and nothing heavy imported before it is needed."""

from __future__ import annotations

from typing import Annotated

import typer

import transmla
from transmla.cli.bench import bench_models
from transmla.cli.convert import convert_model
from transmla.cli.errors import guarded, heed_termination
from transmla.cli.eval import evaluate_models
from transmla.cli.finetune import finetune_model
from transmla.cli.generate import generate_text
from transmla.cli.inspect import inspect_model
from transmla.cli.verify import verify_model

app = typer.Typer(
    help="Turn grouped-query attention checkpoints into native Multi-head Latent Attention (DeepSeek-V3) ones.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    # Hyphens are shown, underscores are accepted.
    context_settings={
        "token_normalize_func": lambda name: name.replace("_", "-"),
        "help_option_names": ["-h", "--help"],
    },
)
app.command("inspect")(guarded(inspect_model))
app.command("convert")(guarded(convert_model))
app.command("finetune")(guarded(finetune_model))
app.command("eval")(guarded(evaluate_models))
app.command("bench")(guarded(bench_models))
app.command("generate")(guarded(generate_text))
app.command("verify")(guarded(verify_model))


def _show_version(wanted: bool) -> None:
    if wanted:
        print(transmla.__version__)
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Keep the options that come before a subcommand."""


def main() -> None:
    """Run the command line."""
    heed_termination()
    app()
