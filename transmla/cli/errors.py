"""The one place where an error becomes a sentence and an exit code."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable
from functools import wraps
from typing import ParamSpec

import typer

from transmla.cli.progress import speaks
from transmla.errors import TransMLAError
from transmla.versions import untested_notice

Params = ParamSpec("Params")

INTERRUPTED, TERMINATED = 130, 143


_NO_MEMORY = (
    "There is not enough memory for this: a smaller --batch-size, --window or --num-windows takes less, and --dry-run "
    "tells what convert and finetune take."
)


class _Terminated(KeyboardInterrupt):
    """SIGTERM, by which systems and schedulers end a process: it is left as Ctrl-C is."""


def heed_termination() -> None:
    """Have SIGTERM end a command as Ctrl-C does."""

    def terminate(number: int, frame: object) -> None:
        raise _Terminated

    signal.signal(signal.SIGTERM, terminate)


def guarded(command: Callable[Params, None]) -> Callable[Params, None]:
    """Report failures of a subcommand on stderr: 1 failure, 2 usage, 130 interrupted, 143 terminated.

    Libraries that are newer than the tested ones get a line there, and nothing more.
    ``TRANSMLA_DEBUG=1`` keeps the traceback.
    """

    @wraps(command)
    def run(*args: Params.args, **kwargs: Params.kwargs) -> None:
        if speaks() and (notice := untested_notice()):
            print(notice, file=sys.stderr)
        try:
            command(*args, **kwargs)
            # Here, where a pipe that nobody reads any more is heard, and not when Python ends.
            sys.stdout.flush()
        except (typer.Exit, BrokenPipeError):
            # typer ends a command whose output nobody reads (`transmla ... | head`) in silence.
            raise
        except _Terminated as error:
            _leave("Terminated.", error, TERMINATED)
        except KeyboardInterrupt as error:
            _leave("Interrupted.", error, INTERRUPTED)
        except TransMLAError as error:
            _leave(f"Error: {error}", error, error.exit_code)
        except Exception as error:
            if _is_out_of_memory(error):
                _leave(f"Error: {_NO_MEMORY}", error, 1)
            sentence = f"Error: {type(error).__name__}: {error} (not expected; TRANSMLA_DEBUG=1 shows where)"
            _leave(sentence, error, 1)

    return run


def _is_out_of_memory(error: Exception) -> bool:
    # PyTorch has a class of its own on GPUs, and on CPUs none.
    return (
        isinstance(error, MemoryError)
        or type(error).__name__ == "OutOfMemoryError"
        or "can't allocate memory" in str(error)
        or "Cannot allocate memory" in str(error)
    )


def _leave(sentence: str, error: BaseException, code: int) -> None:
    if os.environ.get("TRANSMLA_DEBUG") == "1":
        raise
    print(*sentence.splitlines(), *getattr(error, "__notes__", ()), file=sys.stderr)
    raise typer.Exit(code)
