"""An append-only record of finished work that survives a killed process or machine."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from transmla.checkpoint.disk import fsync, output_errors

Identity = str | dict[str, Any]


class Journal:
    """A file of JSON objects, one a line; the first says what the work belongs to.

    Attributes:
        identity: What the work belongs to, a digest or facts by name, or nothing if there is no record.
        entries: The finished units, oldest first.
    """

    def __init__(self, path: Path, *, check: Callable[[], None] = lambda: None) -> None:
        """Take up the record at ``path``, up to the first line that is damaged; ``check`` may stop an append.

        A kill tears the last line. Whatever comes after a damaged one is done once more.
        """
        self._path, self._check = path, check
        self.identity: Identity | None = None
        self.entries: list[dict[str, Any]] = []
        if not path.exists():
            return
        good = list(_whole_lines(path.read_bytes()))
        size = sum(len(line) for line, _ in good)
        if size < path.stat().st_size:
            os.truncate(path, size)
        if good:
            self.identity = good[0][1].get("identity")
            self.entries = [entry for _, entry in good[1:]]

    def start(self, identity: Identity) -> None:
        """Begin anew, for work that belongs to ``identity``."""
        self._path.unlink(missing_ok=True)
        self._append({"identity": identity})
        self.identity, self.entries = identity, []

    def append(self, entry: dict[str, Any]) -> None:
        """Add one finished unit; it is on the disk when this returns.

        Raises:
            OutputError: the disk refuses.
        """
        self._check()
        self._append(entry)
        self.entries.append(entry)

    def _append(self, entry: dict[str, Any]) -> None:
        with output_errors(self._path):
            with self._path.open("ab") as file:
                file.write(json.dumps(entry).encode() + b"\n")
            fsync(self._path)


def _whole_lines(content: bytes) -> Iterator[tuple[bytes, dict[str, Any]]]:
    """Yield each line with its object, up to the first that is none."""
    for line in content.splitlines(keepends=True):
        try:
            entry = json.loads(line)
        except (ValueError, RecursionError):
            return
        if not line.endswith(b"\n") or not isinstance(entry, dict):
            return
        yield line, entry
