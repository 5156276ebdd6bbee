"""The ``transmla`` command: one file per subcommand, and nothing heavy imported before it is needed."""

from __future__ import annotations

from collections.abc import Callable
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
from transmla.cli.recipes import list_recipes
from transmla.cli.sizes import compare_model_sizes
from transmla.cli.verify import verify_model
from transmla.config import REQUESTS
from transmla.old_names import FIELDS

app = typer.Typer(
    help="Turn grouped-query attention checkpoints into native Multi-head Latent Attention (DeepSeek-V3) ones.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _add(name: str, command: Callable[..., None]) -> None:
    """Add a subcommand; hyphens are shown, underscores and the flags of earlier releases are accepted."""
    old = FIELDS.get(REQUESTS[name].__name__, {}) if name in REQUESTS else {}

    def spell(flag: str) -> str:
        field = flag.replace("-", "_")
        return old.get(field, field).replace("_", "-")

    app.command(name, context_settings={"token_normalize_func": spell})(guarded(command))


_add("inspect", inspect_model)
_add("sizes", compare_model_sizes)
_add("convert", convert_model)
_add("finetune", finetune_model)
_add("eval", evaluate_models)
_add("bench", bench_models)
_add("generate", generate_text)
_add("verify", verify_model)
_add("recipes", list_recipes)


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
