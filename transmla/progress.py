"""How long work tells that it moves on, without knowing who listens."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Protocol, runtime_checkable


@runtime_checkable
class Progress(Protocol):
    """Whoever shows progress: a bar, a log, nothing."""

    def task(self, description: str, total: int) -> AbstractContextManager[Callable[[int], None]]:
        """Open a task of ``total`` steps; the value is called with the number of steps just done."""
        ...


class Silent:
    """Show nothing."""

    @contextmanager
    def task(self, description: str, total: int) -> Iterator[Callable[[int], None]]:
        """Open a task that nobody watches."""
        yield lambda steps: None


def say_nothing(line: str) -> None:
    """Tell nobody."""
