"""Saying in a sentence that a disk refuses."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from transmla.errors import OutputError


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Have a disk that refuses what is written to ``path``, or inside it, told in a sentence.

    Raises:
        OutputError: in the place of an ``OSError``.
    """
    try:
        yield
    except shutil.Error as error:
        # Of a whole tree: where, from where and why, for each file that failed.
        _, target, reason = error.args[0][0]
        raise OutputError(f"{target} cannot be written: {reason}.") from None
    except OSError as error:
        raise OutputError(f"{error.filename or path} cannot be written: {error.strerror or error}.") from None
