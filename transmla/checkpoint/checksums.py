"""SHA-256 of weight files: noted in the report of what writes them, and compared whenever somebody wants to know."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path

from transmla.checkpoint.model_files import FINETUNE_REPORT_FILE, REPORT_FILE, read_report
from transmla.checkpoint.safe_paths import check_inside
from transmla.errors import CheckpointError
from transmla.progress import Progress, Silent

_CHUNK = 2**24


def weight_checksums(folder: Path, *, progress: Progress | None = None) -> dict[str, str]:
    """Return the SHA-256 of every weight file of ``folder``, in hexadecimal, by its name.

    Args:
        folder: of a model.
        progress: who is told how far the reading has come.

    Raises:
        CheckpointError: a file that cannot be read, or that is a link out of the folder.
    """
    paths = sorted(folder.glob("*.safetensors"))
    found = {}
    with (progress or Silent()).task(
        "Adding up", sum(path.stat().st_size for path in paths if path.is_file())
    ) as advance:
        for path in paths:
            check_inside(folder, path)
            found[path.name] = _checksum(path, advance)
    return found


def _checksum(path: Path, advance: Callable[[int], None]) -> str:
    digest = hashlib.sha256()
    try:
        with path.open("rb") as file:
            while chunk := file.read(_CHUNK):
                digest.update(chunk)
                advance(len(chunk))
    except OSError as error:
        raise CheckpointError(f"Shard {path.name} cannot be read: {error.strerror}.") from None
    return digest.hexdigest()


def recorded_checksums(folder: Path) -> dict[str, str] | None:
    """Return what the newest report in ``folder`` says of its weight files; ``None`` where none says anything.

    Raises:
        CheckpointError: a report that is not one.
    """
    for name in (FINETUNE_REPORT_FILE, REPORT_FILE):
        if (folder / name).is_file():
            recorded = read_report(folder, name).get("checksums")
            if recorded is None:
                return None
            if not isinstance(recorded, dict) or not all(isinstance(value, str) for value in recorded.values()):
                raise CheckpointError(f"{folder / name} has no checksums by file name under the key checksums.")
            return recorded
    return None
