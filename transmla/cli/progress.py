"""Progress for people: one bar for each task, on stderr."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.progress import Progress as Display

from transmla.progress import Progress, Silent


class Bars:
    """A bar with count, time spent and time left.

    A display lives only as long as its task, so that other libraries' bars can be drawn in between.
    """

    def __init__(self, console: Console | None = None) -> None:
        self.console = console or Console(stderr=True)

    @contextmanager
    def task(self, description: str, total: int) -> Iterator[Callable[[int], None]]:
        """Show a bar until the task is left."""
        columns = (
            TextColumn("{task.description}", markup=False),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
        )
        # A step of a large model may take minutes, and rich forgets the speed after half of one.
        with Display(*columns, console=self.console, speed_estimate_period=3600) as display:
            bar = display.add_task(description, total=total)
            yield lambda steps: display.advance(bar, steps)


def speaks() -> bool:
    """Return whether this is the one of several processes that speaks."""
    return int(os.environ.get("RANK", 0)) == 0


def warn(line: str) -> None:
    """Print on stderr what may not be as it was meant."""
    print(f"Warning: {line}", file=sys.stderr)


def choose_progress(*, quiet: bool) -> Progress:
    """Return bars, or silence, which then holds for Transformers' own bars as well."""
    if not quiet:
        return Bars()
    from transformers.utils import logging

    logging.disable_progress_bar()
    return Silent()
