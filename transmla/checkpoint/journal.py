"""An append-only record of finished work that survives a killed process or machine."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from transmla.checkpoint.sync import sync
from transmla.errors import OutputError


class Journal:
    """A file of JSON objects, one a line; the first says what the work belongs to.

    Attributes:
        identity: What the work belongs to, or nothing if there is no record.
        entries: The finished units, oldest first.
    """

    def __init__(self, path: Path, *, check: Callable[[], None] = lambda: None) -> None:
        """Take up the record at ``path``, without the last line if a kill has torn it; ``check`` may stop an append."""
        self._path, self._check = path, check
        self.identity: str | None = None
        self.entries: list[dict[str, Any]] = []
        lines = path.read_bytes().splitlines(keepends=True) if path.exists() else []
        if lines and not lines[-1].endswith(b"\n"):
            os.truncate(path, path.stat().st_size - len(lines.pop()))
        if lines:
            self.identity = json.loads(lines[0])["identity"]
            self.entries = [json.loads(line) for line in lines[1:]]

    def start(self, identity: str) -> None:
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
        try:
            with self._path.open("ab") as file:
                file.write(json.dumps(entry).encode() + b"\n")
            sync(self._path)
        except OSError as error:
            raise OutputError(f"{self._path} cannot be written: {error.strerror}.") from None
