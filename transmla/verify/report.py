"""What was checked of a checkpoint, and what was found."""

from __future__ import annotations

from typing import Literal

from pydantic import computed_field

from transmla.records import Record
from transmla.verify.decoding import DecodingReport
from transmla.verify.logits import LogitsReport

Outcome = Literal["passed", "failed", "skipped"]


class Check(Record):
    """One question, and what was found."""

    name: str
    outcome: Outcome
    found: str


class Verification(Record):
    """All that was checked of one checkpoint."""

    model: str
    checks: tuple[Check, ...]
    checksums: dict[str, str] | None = None
    decoding: DecodingReport | None = None
    logits: LogitsReport | None = None

    @property
    def failed(self) -> tuple[Check, ...]:
        """Return what is wrong."""
        return tuple(check for check in self.checks if check.outcome == "failed")

    @computed_field  # type: ignore[prop-decorator]
    @property
    def passed(self) -> bool:
        """Return whether nothing is wrong."""
        return not self.failed
