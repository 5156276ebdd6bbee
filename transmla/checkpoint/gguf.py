"""GGUF files: dequantised once into a safetensors folder, which is then a source like any other."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
import shutil
import struct
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr
from importlib.metadata import version
from io import StringIO
from pathlib import Path
from typing import Any

from transmla import __version__
from transmla.checkpoint.gguf_metadata import check_metadata
from transmla.checkpoint.model_files import find_licenses
from transmla.checkpoint.publish import Staging
from transmla.checkpoint.safe_paths import find_file
from transmla.errors import BusyError, CheckpointError, PublishedError


def stage_gguf(folder: Path, gguf_file: str) -> Path:
    """Return a safetensors folder with the model of ``folder / gguf_file`` in float32.

    It is made by the GGUF reader of transformers, with the whole model in memory, and kept in ``$TRANSMLA_CACHE``
    (``~/.cache/transmla``) under the digest of the file and the versions of what reads it, so that it is made once: a
    later transformers may read it better, and a later transmla refuse what this one let pass. A process that finds
    another at it waits.

    Raises:
        CheckpointError: no such file, not a GGUF file, or one that transformers cannot read.
        OutputError: the cache cannot be written.
    """
    path = find_file(folder, gguf_file)
    with path.open("rb") as file:
        if file.read(4) != b"GGUF":
            raise CheckpointError(f"{path} is not a GGUF file.")
        file.seek(0)
        content = hashlib.file_digest(file, "sha256").hexdigest()
    readers = [__version__, version("transformers")]
    digest = hashlib.sha256(" ".join([content, *readers]).encode()).hexdigest()
    staged = cache_folder() / "gguf" / f"{path.stem}-{digest[:12]}"
    while not staged.is_dir():
        try:
            _stage(path, staged, digest)
        except BusyError:
            time.sleep(1)
    return staged


def cache_folder() -> Path:
    """Return where transmla keeps what can be made again."""
    return Path(os.environ.get("TRANSMLA_CACHE") or "~/.cache/transmla").expanduser()


def _stage(path: Path, staged: Path, digest: str) -> None:
    if importlib.util.find_spec("gguf") is None:
        raise CheckpointError("Reading GGUF files needs the gguf package: pip install 'transmla[gguf]'.")
    try:
        with Staging(staged, identity=digest) as staging:
            _dequantize(path, staging.folder)
            for license_file in find_licenses(path.parent):
                shutil.copyfile(license_file, staging.folder / license_file.name)
            staging.publish()
    except PublishedError:
        return  # The same file, made by another process since it was looked for.


def _dequantize(path: Path, output_dir: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    num_biases = check_metadata(path)
    with _quiet():
        try:
            model, report = AutoModelForCausalLM.from_pretrained(
                path.parent,
                gguf_file=path.name,
                quantization_config=GgufConfig(dequantize=True),
                dtype=torch.float32,
                output_loading_info=True,
            )
            tokenizer = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
        except Exception as error:  # the reader fails in as many ways as there are malformed files
            raise CheckpointError(f"transformers cannot read {path}: {' '.join(str(error).split())}") from error
        # What a file lacks, as one part of a split model does, has been filled with random numbers.
        if missing := report["missing_keys"]:
            raise CheckpointError(f"{path} lacks {len(missing)} tensors of the model, such as {min(missing)}.")
        # What the class has no place for, its reader leaves out without a word.
        if (read := sum(name.endswith(".bias") for name in model.state_dict())) != num_biases:
            raise CheckpointError(
                f"{path} holds {num_biases} biases, of which the {model.config.model_type} of transformers has {read}: "
                "convert the safetensors checkpoint of this model."
            )
        model.save_pretrained(output_dir)
        tokenizer.save_pretrained(output_dir)
    config = output_dir / "config.json"
    config.write_text(json.dumps(_shorten(json.loads(config.read_text())), indent=2, sort_keys=True) + "\n")


def _shorten(value: Any) -> Any:
    """Give numbers that GGUF has kept in float32 back their spelling: 9.999999747378752e-06 was 1e-05."""
    if isinstance(value, dict):
        return {key: _shorten(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_shorten(item) for item in value]
    if not isinstance(value, float) or not _is_float32(value):
        return value
    return next(short for digits in range(1, 18) if _to_float32(short := float(f"{value:.{digits}g}")) == value)


def _to_float32(value: float) -> float:
    return struct.unpack("f", struct.pack("f", value))[0]


def _is_float32(value: float) -> bool:
    try:
        return _to_float32(value) == value
    except OverflowError:
        return False


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep progress bars and remarks about the file format from a user who did not ask for a transformers model."""
    from transformers.utils import logging

    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        with redirect_stderr(StringIO()), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.set_verbosity(verbosity)
