"""The page on report files names every field that is written."""

from __future__ import annotations

from pathlib import Path
from typing import get_args

import pytest

from transmla.bench.report import BenchCell, BenchModel, BenchReport
from transmla.convert.excess import MeasuredSize
from transmla.convert.inspection import Inspection
from transmla.convert.report import CalibrationReport, ConversionReport, LayerReport
from transmla.convert.size_table import SizeRow, SizesReport
from transmla.convert.summary import PlanSummary, Prediction
from transmla.evaluate.parts import PARTS
from transmla.evaluate.report.report import EvalReport
from transmla.finetune.report import FinetunePlan, FinetuneReport, HeldoutPoint, TrainingPoint
from transmla.generate.report import GenerationReport
from transmla.records import Record
from transmla.verify.report import Check, Verification

PAGE = (Path(__file__).parents[2] / "docs" / "reference" / "report-files.md").read_text(encoding="utf-8")
_TOP = {
    *(BenchCell, BenchModel, BenchReport, Inspection, CalibrationReport, ConversionReport, LayerReport),
    *(PlanSummary, Prediction, EvalReport, FinetunePlan, FinetuneReport, HeldoutPoint, TrainingPoint),
    *(GenerationReport, Check, Verification, MeasuredSize, SizeRow, SizesReport),
    *(part.record for part in PARTS.values()),
}


def with_nested(records: set[type[Record]]) -> set[type[Record]]:
    """Add the records that stand in fields of records."""
    found, waiting = set(), list(records)
    while waiting:
        kind = waiting.pop()
        if isinstance(kind, type) and issubclass(kind, Record) and kind not in found:
            found.add(kind)
            waiting += [info.annotation for info in kind.model_fields.values()]
        else:
            waiting += get_args(kind)
    return found


RECORDS = with_nested(_TOP)


@pytest.mark.parametrize(
    "record", sorted(RECORDS, key=lambda record: record.__name__), ids=lambda record: record.__name__
)
def test_every_field_is_on_the_page(record):
    assert [field for field in record.model_fields if f"`{field}`" not in PAGE] == []


def test_every_part_of_an_evaluation_is_on_the_page():
    assert [name for name in PARTS if f"`{name}`" not in PAGE] == []
