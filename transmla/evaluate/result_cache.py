"""Results that outlive a run: a finished one is found again by what it is about.

A key holds all that decides a result: the weights, the text, the settings, the versions of the libraries. Results are
files named by the hash of their key, and appear by one rename. A model's files are told by what is in them, and by
their times only where a change of those cannot be hidden (:mod:`transmla.checkpoint.stamps`).
"""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy
import torch
from torch import Tensor

from transmla.checkpoint.gguf import cache_folder
from transmla.checkpoint.source import Source
from transmla.checkpoint.stamps import file_stamp, model_files
from transmla.errors import OutputError
from transmla.versions import loaded_versions

MAX_STATES = 2 * 10**9
"""Bytes of hidden states of one source on one text that are kept after a run."""

SETTLED_NS = 2 * 10**9
"""Nanoseconds for which a file must have been left alone before the hash of it is kept; some disks count in seconds."""

Arrays = dict[str, numpy.ndarray]


@contextmanager
def open_result_cache(*, lasting: bool) -> Iterator[ResultCache]:
    """Open the folder of results under ``$TRANSMLA_CACHE``, or one for this run alone.

    Raises:
        OutputError: it cannot be made.
    """
    if not lasting:
        with tempfile.TemporaryDirectory(prefix="transmla-eval-") as scratch:
            yield ResultCache(Path(scratch))
        return
    folder = cache_folder() / "eval"
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(
            f"{folder}, for results that are found again, cannot be made: {error.strerror}; pass --no-cache, or set "
            "TRANSMLA_CACHE."
        ) from None
    yield ResultCache(folder)
    # They save the source a pass over the text, but must not fill a disk.
    for states in folder.glob("*.states"):
        if states.stat().st_size > MAX_STATES:
            states.unlink(missing_ok=True)


class ResultCache:
    """A folder of results."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def path(self, key: Mapping[str, Any], ending: str) -> Path:
        """Return where what belongs to a key lies, or will lie."""
        return self.folder / (_digest({**key, "versions": loaded_versions().model_dump()}) + ending)

    def arrays(self, key: Mapping[str, Any], make: Callable[[], Arrays]) -> Arrays:
        """Return arrays that were found before, or make them now."""
        path = self.path(key, ".npz")
        if not path.exists():
            found = make()
            self._publish(path, lambda file: numpy.savez(file, allow_pickle=False, **found))
            return found
        with numpy.load(path, allow_pickle=False) as stored:
            return dict(stored)

    def record(self, key: Mapping[str, Any], make: Callable[[], Any]) -> Any:
        """Return plain values that were found before, or make them now."""
        path = self.path(key, ".json")
        if not path.exists():
            found = make()
            self._publish(path, lambda file: file.write(json.dumps(found).encode()))
        return json.loads(path.read_text(encoding="utf-8"))

    def fingerprint(self, model: Source, *, weights: bool = True) -> str:
        """Return the hash of all that a model says something by: config, weights, tokenizer, templates, defaults.

        Its files are read whole, the large ones each once in its life; ``weights`` may be left out.
        """
        files = {
            name: path for name, path in model_files(model.folder).items() if weights or path.suffix != ".safetensors"
        }
        return _digest({name: self._file_hash(path) for name, path in files.items()})

    def _file_hash(self, path: Path) -> str:
        before = _change(path)
        stamp = file_stamp(path)
        if stamp.whole:
            return stamp.sha256
        noted = self.path({"file": str(path.resolve()), "stamp": stamp, "change": before}, ".json")
        if noted.exists():
            return str(json.loads(noted.read_text(encoding="utf-8")))
        with path.open("rb") as file:
            found = hashlib.file_digest(file, "sha256").hexdigest()
        # What is written in one tick of the clock leaves one time, so that of what is young no hash is kept.
        if _change(path) == before and time.time_ns() - before.time_ns > SETTLED_NS:
            self._publish(noted, lambda file: file.write(json.dumps(found).encode()))
        return found

    def _publish(self, path: Path, write: Callable[[Any], Any]) -> None:
        try:
            with tempfile.NamedTemporaryFile(dir=self.folder, delete=False) as file:
                write(file)
            os.replace(file.name, path)
        except OSError as error:
            raise OutputError(f"{path} cannot be written: {error.strerror}; pass --no-cache.") from None


class HiddenStateFile:
    """Hidden states after a decoder, one row a judged token, mapped and not read: the head makes logits of them.

    They are as many numbers as the model is wide, where logits would be a vocabulary; with them a source is run over a
    text once, whatever it is compared with.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    @property
    def complete(self) -> bool:
        """Return whether all of them are there."""
        return self.path.exists()

    @contextmanager
    def filled(self, shape: tuple[int, int], dtype: torch.dtype) -> Iterator[Tensor]:
        """Give rows to be filled; they appear when all are, and vanish when that fails."""
        size = shape[0] * shape[1]
        unfinished = self.path.with_suffix(f".{os.getpid()}.part")
        try:
            with unfinished.open("wb") as file:
                file.truncate(size * dtype.itemsize)
            yield torch.from_file(str(unfinished), shared=True, size=size, dtype=dtype).view(shape)
            unfinished.replace(self.path)
        finally:
            unfinished.unlink(missing_ok=True)

    def open(self, shape: tuple[int, int], dtype: torch.dtype) -> Tensor:
        """Return the rows."""
        return torch.from_file(str(self.path), shared=False, size=shape[0] * shape[1], dtype=dtype).view(shape)


class _Change(NamedTuple):
    """What no copy keeps: a file's inode, and when that was last changed, which nobody can set."""

    device: int
    inode: int
    time_ns: int


def _change(path: Path) -> _Change:
    status = path.stat()
    return _Change(status.st_dev, status.st_ino, status.st_ctime_ns)


def _digest(key: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:32]
