"""The one place where an error becomes a sentence and an exit code."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from functools import wraps
from typing import ParamSpec

import typer

from transmla.errors import TransMLAError

Params = ParamSpec("Params")

INTERRUPTED = 130


def guarded(command: Callable[Params, None]) -> Callable[Params, None]:
    """Report failures of a subcommand on stderr: 1 failure, 2 usage, 130 interrupted.

    ``TRANSMLA_DEBUG=1`` keeps the traceback.
    """

    @wraps(command)
    def run(*args: Params.args, **kwargs: Params.kwargs) -> None:
        try:
            command(*args, **kwargs)
        except typer.Exit:
            raise
        except KeyboardInterrupt as error:
            _leave("Interrupted.", error, INTERRUPTED)
        except TransMLAError as error:
            _leave(f"Error: {error}", error, error.exit_code)
        except Exception as error:
            sentence = f"Error: {type(error).__name__}: {error} (not expected; TRANSMLA_DEBUG=1 shows where)"
            _leave(sentence, error, 1)

    return run


def _leave(sentence: str, error: BaseException, code: int) -> None:
    if os.environ.get("TRANSMLA_DEBUG") == "1":
        raise
    print(*sentence.splitlines(), *getattr(error, "__notes__", ()), file=sys.stderr)
    raise typer.Exit(code)
