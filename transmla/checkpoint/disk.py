"""Writing to disks that refuse, and machines that crash."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from transmla.errors import OutputError


@contextmanager
def output_errors(path: Path) -> Iterator[None]:
    """Turn the refusal of a disk to take what is written to ``path``, or inside it, into a sentence.

    Raises:
        OutputError: instead of an ``OSError``.
    """
    try:
        yield
    except shutil.Error as error:
        # Of a whole tree: where, from where and why, for each file that failed.
        _, target, reason = error.args[0][0]
        raise OutputError(f"{target} cannot be written: {reason}.") from None
    except OSError as error:
        raise OutputError(f"{error.filename or path} cannot be written: {error.strerror or error}.") from None


def replace_text(path: Path, text: str) -> None:
    """Write a file that appears, or replaces one, when it is complete.

    Raises:
        OutputError: it cannot be written.
    """
    unfinished = path.with_name(f".{path.name}.part")
    try:
        unfinished.write_text(text, encoding="utf-8")
        unfinished.replace(path)
    except OSError as error:
        raise OutputError(f"{path} cannot be written: {error.strerror or error}.") from None


def fsync(path: Path) -> None:
    """Wait until a file, or the list of names in a folder, is on the disk and outlives a crash of the machine."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
