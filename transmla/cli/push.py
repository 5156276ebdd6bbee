"""``--push-to-hub`` of the commands that make a model."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer

from transmla.cli.progress import speaks

PushToHub = Annotated[
    str | None,
    typer.Option(
        help="Upload OUTPUT_DIR to this hub id when it is complete; a new repository is private. Every file is named "
        "before."
    ),
]


@contextmanager
def pushing(repo_id: str | None, folder: Path, *, token: str | None) -> Iterator[None]:
    """Look at the repository before the work, and upload the folder after it; do nothing without an id.

    Of several processes, one does so.
    """
    if repo_id is None or not speaks():
        yield
        return
    from transmla.checkpoint.push import make_repository, push

    make_repository(repo_id, token=token)
    yield
    push(folder, repo_id, token=token, tell=lambda line: print(line, file=sys.stderr))
