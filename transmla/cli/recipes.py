"""``transmla recipes``: the recipes that come with the package, listed and copied."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from transmla.cli.request_options import AsJson
from transmla.cli.views.facts import facts_table
from transmla.config.recipes import copy_recipe, purpose, shipped_recipes


def list_recipes(
    copy: Annotated[
        str | None, typer.Argument(help="A recipe to copy, as convert/third; without one all are listed.")
    ] = None,
    target: Annotated[Path, typer.Argument(help="File or folder to copy it to.")] = Path("."),
    as_json: AsJson = False,
) -> None:
    """List the recipes that --config finds by name, or copy one to change it."""
    if copy is not None:
        print(copy_recipe(copy, target))
        return
    found = {name: purpose(path) for name, path in shipped_recipes().items()}
    if as_json:
        print(json.dumps(found, indent=2))
        return
    table = facts_table("Recipes: transmla COMMAND … --config NAME, and flags win over them")
    for name, what in found.items():
        table.add_row(name, what)
    Console().print(table)
