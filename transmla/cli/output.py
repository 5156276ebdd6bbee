"""The one place that prints results: tables for people, or JSON for programs."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TypeVar

from rich.console import Console, RenderableType

from transmla.records import Record

Result = TypeVar("Result", bound=Record)


def show(result: Result, view: Callable[[Result], RenderableType | Iterable[RenderableType]], *, as_json: bool) -> None:
    """Print a record on standard output, as JSON or as its ``view``, one or several tables."""
    if as_json:
        print(result.model_dump_json(indent=2))
        return
    tables = view(result)
    Console().print(*(tables if isinstance(tables, Iterable) else [tables]), sep="\n")
