"""Rows of a data set, one after the other: of files, and of the hub's data sets.

Files are read a row at a time, and nothing is converted: a column that nobody asks for is not looked at, and a row that
cannot be read is named by its number.
"""

from __future__ import annotations

import csv
import io
import json
import re
import sys
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import chain, islice
from pathlib import Path
from typing import Any

from transmla.data.chats import CHAT_COLUMNS
from transmla.data.formats import FILE_SUFFIXES, KNOWN, READ_ERRORS, Format, format_of, open_bytes, unreadable
from transmla.errors import DataError

_HUB_NAME = re.compile(r"\w[\w.-]*(/\w[\w.-]*)?(:[^:]*){0,2}")
_BATCH_ROWS = 256
# Columns whose values are lists.
_LISTS_OF_A_ROW = {*chain.from_iterable(CHAT_COLUMNS), "tools"}
_DELIMITERS = ",;\t|"
_SAID = re.compile(f"sep=([{_DELIMITERS}])")
_QUOTED = re.compile(r'"[^"]*("|\Z)')


@dataclass(frozen=True)
class Row:
    """One row.

    Attributes:
        place: where it stands, as in "Line 7 of data.jsonl".
        values: by column.
        filled: whether values that were not there are None, inside others as well, as Arrow fills them in.
    """

    place: str
    values: Mapping[str, Any]
    filled: bool = False


#: Reads rows with these columns, or with all that could hold text.
Read = Callable[[Sequence[str] | None], Generator[Row, None, None]]


class Rows:
    """The rows of a data set, which can be read from the start as often as one likes.

    Attributes:
        dataset: its name.
        columns: names of the columns, where the data set says so before its rows are read.
    """

    def __init__(self, dataset: str, read: Read, columns: Sequence[str] | None = None) -> None:
        """Take what reads the rows: of these columns, or of all that could hold text."""
        self.dataset, self.columns, self._read = dataset, columns, read

    def read(self, columns: Sequence[str] | None = None) -> Generator[Row, None, None]:
        """Yield the rows, with at least these columns, or with all that could hold text.

        Raises:
            DataError: a row that cannot be read.
        """
        return self._read(columns)


def open_rows(dataset: str) -> Rows | None:
    """Open a file of rows, or a hub data set ``name[:config[:split]]``; nothing for a file that is one text.

    Raises:
        DataError: a file that is neither, or there is none, and it is no name of a hub data set; or it cannot be read.
    """
    path = Path(dataset).expanduser()
    if path.is_dir():
        raise DataError(f"{dataset} is a folder: pass a file of it, {KNOWN}.")
    if not path.is_file():
        if path.suffix.lower() in FILE_SUFFIXES or not _HUB_NAME.fullmatch(dataset):
            raise DataError(f"There is no file {dataset}: pass {KNOWN}, or name[:config[:split]].")
        return _open_hub(dataset)
    kind = format_of(path)
    if kind is Format.TEXT:
        return None
    if kind is Format.PARQUET:
        return _open_parquet(path)
    readers: Mapping[Format, Callable[[io.BufferedIOBase, Path], Iterator[Row]]] = {
        Format.LINES: _read_lines,
        Format.JSON: _read_json,
        Format.CSV: _read_csv,
        Format.TSV: partial(_read_csv, delimiter="\t"),
    }
    return Rows(dataset, lambda columns: _read_all(path, readers[kind]))


def _read_all(path: Path, read: Callable[[io.BufferedIOBase, Path], Iterator[Row]]) -> Generator[Row, None, None]:
    try:
        with open_bytes(path) as file:
            yield from read(file, path)
    except READ_ERRORS as error:
        raise unreadable(path, error) from None


def _read_lines(file: io.BufferedIOBase, path: Path) -> Iterator[Row]:
    lines = ((number, line) for number, line in enumerate(file, 1) if line.strip(b" \t\r\n\xef\xbb\xbf"))
    first = [(place, value) for place, value in _parsed(islice(lines, 2), path)]
    if len(first) == 1:
        [(_, value)] = first
        _check_no_rows_inside(value, path)
    for place, value in chain(first, _parsed(lines, path)):
        yield _row(place, value)


def _parsed(lines: Iterable[tuple[int, bytes]], path: Path) -> Iterator[tuple[str, Any]]:
    for number, line in lines:
        place = f"Line {number} of {path}"
        try:
            yield place, json.loads(line.decode("utf-8-sig" if number == 1 else "utf-8"))
        except UnicodeDecodeError as error:
            raise DataError(f"{place} is not UTF-8 text ({error.reason}).") from None
        except (ValueError, RecursionError) as error:
            reason = getattr(error, "msg", str(error))
            raise DataError(f"{place} is not valid JSON ({reason}): {line[:40].decode(errors='replace')!r}.") from None


def _read_json(file: io.BufferedIOBase, path: Path) -> Iterator[Row]:
    content = file.read()
    try:
        value = json.loads(content.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not UTF-8 text ({error.reason}).") from None
    except (ValueError, RecursionError) as error:
        if getattr(error, "msg", "") == "Extra data":
            # Values one after the other, the first of them longer than what the name was judged by.
            yield from _read_lines(io.BytesIO(content), path)
            return
        raise DataError(f"{path} is not valid JSON: {error}.") from None
    _check_no_rows_inside(value, path)
    for number, item in enumerate(value if isinstance(value, list) else [value], 1):
        yield _row(f"Row {number} of {path}", item)


def _row(place: str, value: Any) -> Row:
    if isinstance(value, str):
        # A list of texts.
        value = {"text": value}
    if not isinstance(value, dict):
        raise DataError(f"{place} is {_kind(value)}, and not an object with a value for each column.")
    return Row(place, value)


def _check_no_rows_inside(value: Any, path: Path) -> None:
    """Refuse a single object that holds a whole data set: its rows under a key, or its columns."""
    if isinstance(value, dict) and not _is_row(value) and (what := _rows_inside(value)) is not None:
        raise DataError(f"{path} is one JSON object with {what}: write the rows as JSON lines, one object a line.")


def _is_row(value: dict[str, Any]) -> bool:
    """Return whether an object holds a text or a chat, whatever lists there are beside it."""
    texts = ("text",), ("prompt", "completion")
    return any(all(isinstance(value.get(name), str) for name in names) for names in texts) or any(
        isinstance(items, list)
        and items
        and all(isinstance(item, dict) and {"role", "from"} & item.keys() for item in items)
        for items in value.values()
    )


def _rows_inside(value: dict[str, Any], inside: str = "") -> str | None:
    """Return in words what there is in an object that is a data set, and no value of a row."""
    objects = {key: item for key, item in value.items() if isinstance(item, dict) and item}
    if column := next((key for key, item in objects.items() if set(item) == set(map(str, range(len(item))))), None):
        return f"whole columns, {inside + column!r} among them"
    if len(value) == len(objects) > 1 and len({frozenset(item) for item in objects.values()}) == 1:
        return f"a row under each of its keys, {inside + next(iter(objects))!r} among them"
    for key, items in value.items():
        if isinstance(items, list) and items and key not in _LISTS_OF_A_ROW:
            if all(isinstance(item, dict) for item in items) or all(isinstance(item, list) for item in items):
                return f"rows under the key {inside + key!r}"
            if len(items) > 1 and all(isinstance(item, str | None) for item in items):
                return f"a whole column under the key {inside + key!r}"
    nested = (_rows_inside(item, f"{inside}{key}.") for key, item in objects.items())
    return next((found for found in nested if found is not None), None)


def _read_csv(file: io.BufferedIOBase, path: Path, *, delimiter: str | None = None) -> Iterator[Row]:
    csv.field_size_limit(sys.maxsize)
    with io.TextIOWrapper(file, encoding="utf-8-sig", newline="") as text:  # type: ignore[type-var]
        line = 0
        try:
            header = text.readline()
            # A line before the header, by which spreadsheets tell each other what separates columns.
            if (said := _SAID.fullmatch(header.strip("\r\n"))) is not None:
                delimiter, header, line = said[1], text.readline(), 1
            unquoted = _QUOTED.sub("", header)
            found = delimiter or max(_DELIMITERS, key=unquoted.count)
            reader, before = csv.reader(chain([header], text), delimiter=found, strict=True), line
            names = next(reader, [])
            line = before + reader.line_num
            if twice := {name for name in names if names.count(name) > 1}:
                raise DataError(f"{path} has two columns {min(twice)!r}: name them apart in its first line.")
            for values in reader:
                line = before + reader.line_num
                if not values:
                    continue
                if len(values) != len(names):
                    raise DataError(
                        f"Line {line} of {path} has {len(values)} columns; its first line names {len(names)}."
                    )
                yield Row(f"Line {line} of {path}", dict(zip(names, values, strict=True)))
        except UnicodeDecodeError as error:
            raise DataError(f"{path} is not UTF-8 text after line {line} ({error.reason}).") from None
        except csv.Error as error:
            raise DataError(f"{path} cannot be read after line {line}: {error}.") from None


def _open_parquet(path: Path) -> Rows:
    import pyarrow
    from pyarrow import parquet

    try:
        schema = parquet.read_schema(path)
    except (pyarrow.ArrowException, OSError) as error:
        raise unreadable(path, error) from None
    if twice := {name for name in schema.names if schema.names.count(name) > 1}:
        raise DataError(f"{path} has two columns {min(twice)!r}: name them apart.")
    telling = [field.name for field in schema if _may_hold_text(field.type)]

    def read(columns: Sequence[str] | None) -> Generator[Row, None, None]:
        wanted = telling if columns is None else list(columns)
        number = 0
        try:
            with parquet.ParquetFile(path) as file:
                for batch in file.iter_batches(batch_size=_BATCH_ROWS, columns=wanted):
                    for values in batch.to_pylist():
                        number += 1
                        yield Row(f"Row {number} of {path}", values, filled=True)
        except (pyarrow.ArrowException, OSError, ValueError) as error:
            reason = " ".join(str(error).split())
            raise DataError(f"Row {number + 1} of {path}, or one soon after, cannot be read: {reason}") from None

    return Rows(str(path), read, schema.names)


def _may_hold_text(kind: Any) -> bool:
    from pyarrow import types

    if types.is_dictionary(kind):
        kind = kind.value_type
    text = types.is_string(kind) or types.is_large_string(kind) or types.is_string_view(kind)
    return text or types.is_nested(kind) or types.is_null(kind)


def _open_hub(dataset: str) -> Rows:
    import datasets

    builder, config, split = [*dataset.split(":"), "", ""][:3]
    # It would say the same again, in a line of its own.
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)

    def read(columns: Sequence[str] | None) -> Generator[Row, None, None]:
        number = 0
        # Streaming: nothing is copied into the cache folder, and only what is used is read.
        try:
            found = datasets.load_dataset(builder, name=config or None, split=split or "train", streaming=True)
            if columns is not None:
                found = found.select_columns(list(columns))
            for number, values in enumerate(found, 1):
                yield Row(f"Row {number} of {dataset}", values, filled=True)
        except StopIteration:
            # So it says that there is nothing in a file.
            return
        # The library passes on what the file system, the format and the cast to its schema raise.
        except Exception as error:
            where = f" after row {number}" if number else ""
            reason = " ".join(str(error).split()) or type(error).__name__
            raise DataError(f"The data set {dataset} cannot be read{where}: {reason}") from None

    return Rows(dataset, read)


def _kind(value: Any) -> str:
    return {list: "a list", int: "a number", float: "a number", bool: "true or false"}.get(type(value), "null")
