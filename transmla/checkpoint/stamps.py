"""What tells one version of a model's files from another, without reading hundreds of gigabytes.

Path, size and time of modification do not: ``cp -p``, ``rsync -t``, archives and stores that give all files one time
put other weights there and keep all three. Small files are therefore read whole, every time, and of weights that are
not small the header and three blocks of every tensor: whatever has been trained, merged, cast or converted anew differs
in all of them.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO, NamedTuple

from transmla.checkpoint.model_files import FINETUNE_REPORT_FILE, REPORT_FILE, TOKENIZER_FILES
from transmla.errors import CheckpointError

SMALL = 2**26
"""Bytes up to which a file is read whole."""
_BLOCK = 2**12
_MAX_HEADER = 10**8
_MODEL_FILES = ("*.json", "*.safetensors", "*.model", "*.tiktoken", *TOKENIZER_FILES)
# Seconds, dates and paths stand in them, and nothing reads them that computes.
_REPORTS = {REPORT_FILE, FINETUNE_REPORT_FILE}


def model_files(folder: Path) -> dict[str, Path]:
    """Return by name the files of a model that may decide what it says: config, index, weights, tokenizer, templates.

    An adapter's config and weights are among them, and a file of a name that nobody has heard of is, too, if it is
    JSON: one that decides nothing costs a second computation, and one that is left out a wrong result.
    """
    paths = {path for pattern in _MODEL_FILES for path in folder.glob(pattern) if path.is_file()}
    return {path.relative_to(folder).as_posix(): path for path in sorted(paths) if path.name not in _REPORTS}


class Stamp(NamedTuple):
    """What is known of a file: its size, the hash of what was read of it, and where that is not all, its time.

    That is the time of modification, and 0 for a file that was read whole. The time of the last change of its inode
    is not here: ``chmod`` and hard links move that as well, and must not take hours of work from whoever resumes. Where
    it costs no more than a second reading, it is looked at beside this.
    """

    size: int
    time_ns: int
    whole: bool
    sha256: str


def model_stamp(folder: Path) -> dict[str, Stamp]:
    """Return what tells a model from one that has taken its place.

    Raises:
        CheckpointError: a file cannot be read.
    """
    return {name: file_stamp(path) for name, path in model_files(folder).items()}


def model_digest(folder: Path) -> str:
    """Return the hash of a model's stamp.

    Raises:
        CheckpointError: a file cannot be read.
    """
    return hashlib.sha256(json.dumps(model_stamp(folder)).encode()).hexdigest()


def file_stamp(path: Path) -> Stamp:
    """Look at a file.

    Raises:
        CheckpointError: it cannot be read.
    """
    try:
        status = path.stat()
        with path.open("rb") as file:
            whole = status.st_size <= SMALL
            digest = hashlib.file_digest(file, "sha256") if whole else _digest_of_samples(file, status.st_size)
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror or error}.") from None
    return Stamp(status.st_size, 0 if whole else status.st_mtime_ns, whole, digest.hexdigest())


def _digest_of_samples(file: BinaryIO, size: int) -> hashlib._Hash:
    digest = hashlib.sha256()
    for start, length in list(_samples(file, size)):
        file.seek(start)
        digest.update(file.read(length))
    return digest


def _samples(file: BinaryIO, size: int) -> Iterator[tuple[int, int]]:
    """Yield start and length of what is read: the header, and each tensor's first, middle and last block."""
    length = min(int.from_bytes(file.read(8), "little"), size)
    yield 0, min(8 + length, _MAX_HEADER)
    yield max(0, size - _BLOCK), _BLOCK
    for start, stop in _offsets(file, length):
        if not 0 <= start < stop <= size:
            continue
        for place in (start, (start + stop - _BLOCK) // 2, stop - _BLOCK):
            yield 8 + length + max(start, place), min(_BLOCK, stop - start)


def _offsets(file: BinaryIO, length: int) -> list[tuple[int, int]]:
    """Return where the tensors of a safetensors file lie; nothing where it is none, which its reader will refuse."""
    try:
        header = json.loads(file.read(min(length, _MAX_HEADER)))
        found = [entry["data_offsets"] for name, entry in header.items() if name != "__metadata__"]
        return [(int(start), int(stop)) for start, stop in sorted(found)]
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        return []
