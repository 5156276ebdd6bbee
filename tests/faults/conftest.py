"""Commands that are hurt while they run, and what must be true afterwards."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
FAULTS: Counter[str] = Counter()
"""Runs that were hurt, by what hurt them: the figures of docs/results/reliability.md."""


@dataclass(frozen=True)
class Outcome:
    """What a command came to."""

    code: int
    stderr: str
    count: int | None
    names: list[str] = field(repr=False)
    peak_bytes: int = 0


class Forks:
    """The process that forks."""

    def __init__(self) -> None:
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "COLUMNS": "80"}
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.faults.forks"],
            cwd=ROOT,
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def run(self, root: Path, arguments: list[object], *, fault: dict[str, Any] | None = None, **job: Any) -> Outcome:
        """Run a command, with a fault at one of the boundaries below ``root``."""
        assert self._process.stdin
        assert self._process.stdout
        request = {"root": str(root), "arguments": [str(word) for word in arguments], "fault": fault, **job}
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        if fault or job:
            FAULTS[(fault or {"kind": "limits"})["kind"]] += 1
        return Outcome(**json.loads(self._process.stdout.readline()))

    def close(self) -> None:
        assert self._process.stdin
        assert self._process.stdout
        self._process.stdin.close()
        self._process.wait()
        self._process.stdout.close()


@pytest.fixture(scope="session")
def forks() -> Iterator[Forks]:
    forks = Forks()
    yield forks
    forks.close()
    if path := os.environ.get("TRANSMLA_FAULTS_REPORT"):
        # A line for each process that runs tests.
        with Path(path).open("a", encoding="utf-8") as file:
            file.write(json.dumps(FAULTS) + "\n")


def boundaries(number: int, *, few: int, chosen: bool) -> list[int]:
    """All of them, or some that lie evenly, the first and the last among them."""
    if not chosen:
        return list(range(1, number + 1))
    return sorted({1 + round(step * (number - 1) / (few - 1)) for step in range(few)})


def contents(folder: Path) -> dict[str, Any]:
    """The files of a folder; a report without what differs from run to run."""
    found: dict[str, Any] = {}
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if name.endswith(".json") and name.startswith("transmla_"):
            found[name] = {**json.loads(path.read_text()), "seconds": None}
        elif path.is_file():
            found[name] = path.read_bytes()
    return found


@dataclass
class Bench:
    """A command with its output folder, and the output of an undisturbed run."""

    forks: Forks
    root: Path
    output: Path
    arguments: list[object]
    whole: dict[str, Any]
    boundaries: list[str]
    same: Callable[[dict[str, Any], dict[str, Any]], bool]

    def hurt(self, fault: dict[str, Any] | None, **job: Any) -> Outcome:
        """Run with a fault, and check what must be true after every one."""
        outcome = self.forks.run(self.root, self.arguments, fault=fault, **job)
        assert "Traceback" not in outcome.stderr, outcome.stderr
        if self.output.exists():
            assert self.same(contents(self.output), self.whole), f"{fault}: the output is not whole"
        assert {path.name for path in self.root.iterdir()} <= {self.output.name, f".{self.output.name}.partial"}
        return outcome

    def finish(self) -> None:
        """Run again with --resume: the same bytes, and nothing is left beside them."""
        if not self.output.exists():
            outcome = self.forks.run(self.root, [*self.arguments, "--resume"])
            assert outcome.code == 0, outcome.stderr
        assert self.same(contents(self.output), self.whole)
        # What a kill between the last rename and the cleaning up has left is cleaned up by the next run.
        self.clean()

    def clean(self) -> None:
        """Make room for the next fault."""
        for path in self.root.iterdir():
            shutil.rmtree(path)
