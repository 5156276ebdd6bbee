"""The page on report files names every field that is written."""

from __future__ import annotations

from pathlib import Path

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
from transmla.verify.report import Check, Verification

PAGE = (Path(__file__).parents[2] / "docs" / "reference" / "report-files.md").read_text(encoding="utf-8")
RECORDS = {
    *(BenchCell, BenchModel, BenchReport, Inspection, CalibrationReport, ConversionReport, LayerReport),
    *(PlanSummary, Prediction, EvalReport, FinetunePlan, FinetuneReport, HeldoutPoint, TrainingPoint),
    *(GenerationReport, Check, Verification, MeasuredSize, SizeRow, SizesReport),
    *(part.record for part in PARTS.values()),
}


@pytest.mark.parametrize(
    "record", sorted(RECORDS, key=lambda record: record.__name__), ids=lambda record: record.__name__
)
def test_every_field_is_on_the_page(record):
    assert [field for field in record.model_fields if f"`{field}`" not in PAGE] == []


def test_every_part_of_an_evaluation_is_on_the_page():
    assert [name for name in PARTS if f"`{name}`" not in PAGE] == []
