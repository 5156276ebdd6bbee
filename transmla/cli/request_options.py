"""A command's arguments and flags from its request: types, choices and help are written once, there.

A command is a function of a request and of options of its own; what Typer sees has a parameter for each field besides.
"""

from __future__ import annotations

import inspect
import types
from collections.abc import Callable, Iterator
from functools import wraps
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import typer

from transmla.config import REQUESTS, Request
from transmla.config.recipes import find_recipe

Recipe = Annotated[
    str | None, typer.Option("--config", help="YAML recipe, or the name of a shipped one; flags win over it.")
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON instead of tables.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Show no progress.")]
Resume = Annotated[bool, typer.Option("--resume", help="Continue an interrupted run of the same request.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace OUTPUT_DIR when complete, if it holds a model.")]

IN_A_RECIPE_ONLY = "; in a recipe only."


def takes_request(command: str) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Make the Typer command of that name of a function whose first parameter is its request."""
    request = REQUESTS[command]

    def decorate(function: Callable[..., None]) -> Callable[..., None]:
        own = list(inspect.signature(function, eval_str=True).parameters.values())[1:]
        fields = [*_parameters(request)]
        names = {parameter.name for parameter in fields}

        @wraps(function)
        def run(config: str | None = None, **values: Any) -> None:
            recipe = None if config is None else find_recipe(config, command)
            flags = {name: value for name, value in values.items() if name in names}
            others = {name: value for name, value in values.items() if name not in names}
            function(request.build(recipe=recipe, flags=flags), **others)

        config = inspect.Parameter("config", inspect.Parameter.KEYWORD_ONLY, default=None, annotation=Recipe)
        parameters = [*fields, config, *(parameter.replace(kind=config.kind) for parameter in own)]
        run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
        run.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
        return run

    return decorate


def _parameters(request: type[Request]) -> Iterator[inspect.Parameter]:
    """Yield the parameters of a request's fields, arguments first."""
    for name in (*request.ARGUMENTS, *(name for name in request.model_fields if name not in request.ARGUMENTS)):
        info = request.model_fields[name]
        if str(info.description).endswith(IN_A_RECIPE_ONLY):
            continue
        kind, choices = _kind(info.annotation)
        help_text = request.describe(name)
        shown: Any
        if name in request.ARGUMENTS:
            shown = typer.Argument(help=help_text)
        elif kind is bool:
            flag = "--" + name.replace("_", "-")
            # What is off unless asked for can be switched off again where a recipe asks for it.
            both = flag if name.startswith("no_") else f"{flag}/--no-{flag[2:]}"
            shown = typer.Option(both, help=help_text)
        elif choices:
            shown = typer.Option(help=help_text, metavar=f"[{'|'.join(choices)}]", autocompletion=_completion(choices))
        else:
            shown = typer.Option(help=help_text)
        yield inspect.Parameter(
            name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=Annotated[kind | None, shown]
        )


def _kind(annotation: Any) -> tuple[Any, tuple[str, ...]]:
    """Return the type of a field on the command line, and its choices; a word that is none the request refuses."""
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin in (Union, types.UnionType):
        [annotation] = [argument for argument in arguments if argument is not type(None)]
        return _kind(annotation)
    if origin is Annotated:
        return _kind(arguments[0])
    if origin is Literal:
        return str, tuple(map(str, arguments))
    if origin is tuple:
        return list[str], _kind(arguments[0])[1]
    assert annotation in (str, int, float, bool, Path), annotation
    return annotation, ()


def _completion(choices: tuple[str, ...]) -> Callable[[str], list[str]]:
    def complete(incomplete: str) -> list[str]:
        return [choice for choice in choices if choice.startswith(incomplete)]

    return complete
