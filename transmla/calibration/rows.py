"""Rows of a data set, one after the other: JSON lines, JSON and parquet files, and the hub's data sets."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from transmla.errors import DataError

_BUILDERS = {".json": "json", ".jsonl": "json", ".parquet": "parquet"}
_TEXT_SUFFIXES = {".txt", ".utf8", ".md"}
_HUB_NAME = re.compile(r"\w[\w.-]*(/\w[\w.-]*)?(:[^:]*){0,2}")


def has_rows(dataset: str) -> bool:
    """Say whether a data set consists of rows; a file that does not is one text.

    Raises:
        DataError: there is no such file, and it is no name of a hub data set.
    """
    path = Path(dataset).expanduser()
    if path.is_dir():
        raise DataError(f"{dataset} is a folder: pass one text, JSONL or parquet file.")
    suffix = path.suffix.lower()
    if path.is_file():
        return suffix in _BUILDERS
    if suffix in _TEXT_SUFFIXES or suffix in _BUILDERS or not _HUB_NAME.fullmatch(dataset):
        raise DataError(f"There is no file {dataset}: pass a text, JSONL or parquet file, or name[:config[:split]].")
    return True


def open_rows(dataset: str) -> Iterator[Mapping[str, Any]]:
    """Yield the rows of a file, or of a hub data set ``name[:config[:split]]``, and read no more than is taken.

    Raises:
        DataError: it cannot be read.
    """
    import datasets

    path = Path(dataset).expanduser()
    options: dict[str, Any]
    if path.is_file():
        builder, options = _BUILDERS[path.suffix.lower()], {"data_files": str(path), "split": "train"}
    else:
        builder, config, split = [*dataset.split(":"), "", ""][:3]
        options = {"name": config or None, "split": split or "train"}
    # It would say the same again, in a line of its own.
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)
    # Streaming: nothing is copied into the cache folder, and only what is used is read.
    try:
        yield from datasets.load_dataset(builder, streaming=True, **options)
    except (OSError, ValueError, RuntimeError, datasets.exceptions.DatasetsError) as error:
        raise DataError(f"The data set {dataset} cannot be read: {' '.join(str(error).split())}") from None
    except StopIteration:
        # So it says that there is nothing in a file.
        raise DataError(f"{dataset} holds no rows: pass a data set that does.") from None
