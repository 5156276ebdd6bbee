"""The files of a model folder: found by plain names, and never outside it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from transmla.errors import CheckpointError

# The largest vocabularies and indices have some tens of millions.
_MAX_JSON_BYTES = 500_000_000
# No file system takes longer ones, and some say so by an error.
_MAX_NAME_BYTES = 255


def find_file(folder: Path, name: str) -> Path:
    """Return the file ``name`` of ``folder``.

    Raises:
        CheckpointError: not a plain file name, absent, or a link out of the folder.
    """
    if name in ("", ".", "..") or "/" in name or "\\" in name:
        raise CheckpointError(f"{folder} refers to the file {name!r}; only plain names inside the folder are read.")
    path = folder / name
    if len(name.encode(errors="replace")) > _MAX_NAME_BYTES or not path.is_file():
        raise CheckpointError(f"{folder} has no file {name[:255]}; check the name, or download the model again.")
    check_inside(folder, path)
    return path


def check_inside(folder: Path, path: Path) -> None:
    """Make sure that ``path`` does not lead out of ``folder``.

    A hub cache is the exception: its snapshots consist of links to the blobs beside them.

    Raises:
        CheckpointError: a link out of the folder.
    """
    root, target = folder.resolve(), path.resolve()
    in_hub_cache = root.parent.name == "snapshots" and target.is_relative_to(root.parent.parent / "blobs")
    if not (target.is_relative_to(root) or in_hub_cache):
        raise CheckpointError(f"{path} is a link out of the model folder; put the file itself there.")


def read_json(folder: Path, name: str) -> dict[str, Any]:
    """Read one JSON object of ``folder``.

    Raises:
        CheckpointError: absent, or not a JSON object.
    """
    try:
        path = find_file(folder, name)
        if path.stat().st_size > _MAX_JSON_BYTES:
            raise ValueError(f"more than {_MAX_JSON_BYTES:,} bytes")
        content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, OSError, RecursionError) as error:
        raise CheckpointError(f"{folder / name} is not valid JSON: {error}.") from None
    if not isinstance(content, dict):
        raise CheckpointError(f"{folder / name} must hold a JSON object, found {type(content).__name__}.")
    return content
