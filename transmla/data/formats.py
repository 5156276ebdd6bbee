"""What a file of data is: text, or rows of one kind or another. Its first bytes decide where they tell, else its name.

A compressed file is what it is without its compression. What is neither is refused by name, for a file of numbers that
is read as prose looks like a bad model.
"""

from __future__ import annotations

import bz2
import gzip
import io
import json
import lzma
import re
from enum import Enum
from pathlib import Path
from typing import Any

from transmla.errors import DataError


class Format(Enum):
    """Text, or how rows are written down."""

    TEXT = "text"
    LINES = "JSON lines"
    JSON = "JSON"
    CSV = "CSV"
    TSV = "TSV"
    PARQUET = "parquet"


#: What is read, in words.
KNOWN = "text (.txt), JSON lines (.jsonl, .jsonlines, .ndjson), JSON, CSV, TSV or parquet"

_SUFFIXES = {
    **dict.fromkeys((".jsonl", ".jsonlines", ".ndjson", ".jl"), Format.LINES),
    ".json": Format.JSON,
    ".csv": Format.CSV,
    **dict.fromkeys((".tsv", ".tab"), Format.TSV),
    **dict.fromkeys((".parquet", ".pq"), Format.PARQUET),
}
_TEXT_SUFFIXES = {".txt", ".text", ".utf8", ".md", ".rst", ".tex", ".log"}
#: Last parts of names that are of files, and of no data set of the hub.
FILE_SUFFIXES = {*_SUFFIXES, *_TEXT_SUFFIXES, ".gz", ".bz2", ".xz", ".zst"}
_COMPRESSED = {
    b"\x1f\x8b": ".gz",
    b"BZh": ".bz2",
    b"\xfd7zXZ\x00": ".xz",
    b"\x28\xb5\x2f\xfd": ".zst",
}
# Beginnings of other files, and what to do with them; completes "… is ".
_ARCHIVE = "an archive: unpack it, and pass a file of it"
_OTHER_STARTS = {
    b"PK\x03\x04": f"{_ARCHIVE} (a spreadsheet: save it as CSV)",
    b"Rar!": _ARCHIVE,
    b"7z\xbc\xaf": _ARCHIVE,
    b"\x04\x22\x4d\x18": "compressed by lz4: unpack it",
    b"ARROW1": "an Arrow file: load it with datasets, and write it with to_parquet",
    b"%PDF": "a PDF file: save its text",
    b"GGUF": "a model",
    b"SQLite format 3": "a data base: export it as CSV",
    b"\x93NUMPY": "an array of numbers",
}
# Beginnings of what would be read if it were written otherwise.
_UNREAD_STARTS = {
    b"version https://git-lfs": "a pointer of git-lfs, and not the file itself: git lfs pull gets it",
    **dict.fromkeys(
        (b"\xff\xfe", b"\xfe\xff", b"\x00\x00\xfe\xff"), "not UTF-8 text, but UTF-16 or UTF-32: save it as UTF-8"
    ),
}
_WEB_PAGE = re.compile(rb"(\xef\xbb\xbf)?\s*(<!doctype html|<html)", re.IGNORECASE)
_WEB_SUFFIXES = {".html", ".htm", ".xhtml"}
_OTHER_SUFFIXES = {
    **dict.fromkeys((".tar", ".tgz", ".zip", ".7z", ".rar"), _ARCHIVE),
    **dict.fromkeys((".arrow", ".feather"), _OTHER_STARTS[b"ARROW1"]),
    **dict.fromkeys((".xls", ".xlsx", ".ods"), "a spreadsheet: save it as CSV"),
    **dict.fromkeys((".pkl", ".pickle", ".pt", ".pth"), "a pickle, which can run code when it is read"),
    **dict.fromkeys((".docx", ".odt", ".epub"), "a document: save its text"),
}
_PARQUET = b"PAR1"
_HEAD_BYTES = 65_536
_LIKE_JSON = re.compile(r'\s*((\[\s*)?\{\s*("(\\.|[^"\\])*"\s*:|\})|\[\s*")')


def format_of(path: Path) -> Format:
    """Return what a file holds.

    Raises:
        DataError: something else than text or rows; what, and what to do.
    """
    start = _read(path, 32)
    suffix = _inner_suffix(path)
    _check_start(path, start)
    if suffix in _OTHER_SUFFIXES:
        raise DataError(f"{path} is {_OTHER_SUFFIXES[suffix]}; {KNOWN} is needed.")
    if start.startswith(_PARQUET):
        return Format.PARQUET
    by_name = _SUFFIXES.get(suffix, Format.TEXT)
    if by_name is Format.PARQUET:
        what = (
            "compressed as a whole: unpack it" if _compression(start) else "no parquet file: it does not begin as one"
        )
        raise DataError(f"{path} is {what}.")
    with open_bytes(path) as file:
        raw = _peek(file, path)
    if _compression(start):
        _check_start(path, raw)
        if raw.startswith(_PARQUET) or _compression(raw):
            raise DataError(f"{path} is compressed {'twice' if _compression(raw) else 'as a whole'}: unpack it.")
    if _WEB_PAGE.match(raw) and suffix not in _WEB_SUFFIXES:
        raise DataError(f"{path} is a web page: download the file itself, or name it .html to have it read as text.")
    head = raw.decode("utf-8-sig", errors="replace")
    if by_name in (Format.LINES, Format.JSON):
        return _lines_or_whole(head, by_name)
    if by_name is Format.TEXT and _is_json(head):
        raise DataError(
            f"{path} holds JSON and is named as text: name it .jsonl if each line is a row, or .json, to have its rows "
            "read."
        )
    return by_name


def _check_start(path: Path, start: bytes) -> None:
    for magic, what in (_OTHER_STARTS | _UNREAD_STARTS).items():
        if start.startswith(magic):
            needed = f"; {KNOWN} is needed" if magic in _OTHER_STARTS else ""
            raise DataError(f"{path} is {what}{needed}.")


def open_bytes(path: Path) -> io.BufferedIOBase:
    """Open a file for reading, without its compression.

    Raises:
        DataError: it cannot be read, or not on this machine.
    """
    kind = _compression(_read(path, 8))
    try:
        if kind == ".gz":
            return gzip.GzipFile(path)
        if kind == ".bz2":
            return bz2.BZ2File(path)
        if kind == ".xz":
            return lzma.LZMAFile(path)
        if kind == ".zst":
            return _open_zstandard(path)
        return path.open("rb")
    except OSError as error:
        raise unreadable(path, error) from None


def unreadable(path: Path, error: Exception) -> DataError:
    """Raise that a file cannot be read, in whichever way its compression puts it."""
    reason = getattr(error, "strerror", None) or " ".join(str(error).split()) or type(error).__name__
    return DataError(f"{path} cannot be read: {reason}.")


#: What reading a file, compressed or not, may raise.
READ_ERRORS = (OSError, EOFError, lzma.LZMAError, ValueError)


def _open_zstandard(path: Path) -> io.BufferedIOBase:
    try:
        import zstandard
    except ImportError:
        raise DataError(
            f"{path} is compressed by zstd, which needs the package zstandard: pip install zstandard, or unpack it."
        ) from None
    # Frames may follow each other, as those that are written in parallel do.
    reader = zstandard.ZstdDecompressor().stream_reader(path.open("rb"), read_across_frames=True, closefd=True)
    return io.BufferedReader(_Readable(reader, zstandard.ZstdError))


class _Readable(io.RawIOBase):
    """A stream whose errors are those of reading."""

    def __init__(self, stream: Any, error: type[Exception]) -> None:
        self._stream, self._error = stream, error

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]
        try:
            data = self._stream.read(len(buffer))
        except self._error as error:
            raise OSError(str(error)) from None
        buffer[: len(data)] = data
        return len(data)

    def close(self) -> None:
        self._stream.close()
        super().close()


def _read(path: Path, count: int) -> bytes:
    try:
        with path.open("rb") as file:
            return file.read(count)
    except OSError as error:
        raise unreadable(path, error) from None


def _peek(file: io.BufferedIOBase, path: Path) -> bytes:
    try:
        return file.read(_HEAD_BYTES)
    except READ_ERRORS as error:
        raise unreadable(path, error) from None


def _compression(start: bytes) -> str | None:
    return next((suffix for magic, suffix in _COMPRESSED.items() if start.startswith(magic)), None)


def _inner_suffix(path: Path) -> str:
    """Return the last suffix of a name that is not of a compression."""
    suffixes = [suffix.lower() for suffix in path.suffixes]
    while suffixes and suffixes[-1] in _COMPRESSED.values():
        suffixes.pop()
    return suffixes[-1] if suffixes else ""


def _lines_or_whole(head: str, by_name: Format) -> Format:
    """Tell JSON lines from one JSON value: either is found under either name."""
    first, newline, rest = head.lstrip().partition("\n")
    try:
        value = json.loads(first)
    except ValueError:
        # Over several lines, or a line longer than what was looked at: then all of it tells (`rows`).
        return Format.JSON if by_name is Format.JSON or first in ("[", "[{", "{") else Format.LINES
    except RecursionError:
        return by_name
    alone = not rest.strip() and (not newline or len(head) < _HEAD_BYTES // 2)
    if isinstance(value, list) and alone:
        return Format.JSON
    return by_name if alone else Format.LINES


def _is_json(head: str) -> bool:
    """Return whether what is named as text is JSON, an object a line or a value over several lines."""
    if not _LIKE_JSON.match(head):
        return False
    first = head.lstrip().partition("\n")[0].strip().rstrip(",")
    try:
        return isinstance(json.loads(first), dict | list)
    except (ValueError, RecursionError):
        # Laid out over lines, or a line longer than what was looked at.
        return first in ("[", "{", "[{") or len(first) > _HEAD_BYTES // 2 or first.startswith("[{")
