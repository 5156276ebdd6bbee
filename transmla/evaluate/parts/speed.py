"""Speed: what ``transmla bench`` measures, for the models of an evaluation."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from transmla.bench.report import BenchReport
from transmla.bench.run import bench
from transmla.config import BenchRequest, ComparisonRequest, EvalRequest
from transmla.evaluate.lazy_model import LazyModel
from transmla.evaluate.parts.base import Part, Setting
from transmla.evaluate.report.text_table import Shown, TextTable
from transmla.progress import Progress
from transmla.records import Record


class SpeedPart(Part):
    """All models, timed in turns when everything else has been measured; never kept: a machine has its days."""

    name = "speed"
    record = BenchReport
    flags = ("--bench-contexts",)

    def __init__(self, request: EvalRequest, progress: Progress) -> None:
        shared = {name: getattr(request, name) for name in ComparisonRequest.model_fields}
        self._request = BenchRequest(
            **shared, contexts=request.bench_contexts, dtype=request.dtype, device=request.device
        )
        self._progress = progress

    @classmethod
    def wanted(cls, request: EvalRequest) -> bool:
        """Return whether there are contexts."""
        return bool(request.bench_contexts)

    @classmethod
    def longest(cls, request: EvalRequest) -> tuple[int, str]:
        """Return the longest context."""
        return max(request.bench_contexts), "--bench-contexts"

    @classmethod
    def build(cls, setting: Setting) -> Iterator[Part]:
        """Yield one part for all models."""
        yield cls(setting.request, setting.progress)

    def measure(self, lazy: LazyModel, progress: Progress) -> None:
        """Wait: all models run together, in turns."""

    def report(self) -> Iterator[BenchReport]:
        """Run the benchmark."""
        yield bench(self._request, progress=self._progress)

    @classmethod
    def only(cls, record: Any, number: int, full_names: Sequence[str]) -> Record | None:
        """Return the cells of either model."""
        kept = (full_names[0], full_names[number])
        return record.model_copy(update={"cells": tuple(cell for cell in record.cells if cell.model in kept)})

    @classmethod
    def tables(cls, records: Sequence[BenchReport], shown: Shown) -> Iterator[TextTable]:
        """Yield time to the first token and decoding speed."""
        names = dict(zip(shown.full_names, shown.names, strict=True))
        for record in records:
            yield _table(record, names)


def _table(bench: BenchReport, names: Mapping[str, str]) -> TextTable:
    rows = []
    for cell in bench.cells:
        name = names[cell.model] + (", absorbed" if cell.form == "absorbed" else "")
        numbers = (cell.seconds_to_first_token, cell.decode_tokens_per_second, cell.decode_speedup)
        rows.append((name, f"{cell.context:,}", *("-" if number is None else f"{number:.3g}" for number in numbers)))
    return TextTable(
        f"Speed, {bench.dtype}, {bench.machine}, {bench.num_threads} threads",
        ("Model", "Context", "First token, s", "Decoded tokens/s", "of the source's"),
        tuple(rows),
    )
