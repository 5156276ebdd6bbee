"""The evaluation from request to report.

Read top to bottom: find the models, refuse what cannot be compared, read the data, then go from model to model and
measure all parts of the report. At most the source and one converted model are in memory, and neither where everything
about it is known from an earlier run.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, Protocol

from transmla.calibration.text import load_tokenizer
from transmla.config import EvalRequest
from transmla.device import choose_device
from transmla.errors import UsageError
from transmla.evaluate.cost import CostPart
from transmla.evaluate.models import check_comparable, find_models, loaded_versions
from transmla.evaluate.passages import read_passages
from transmla.evaluate.report import EvalReport
from transmla.evaluate.results import Results, open_results
from transmla.evaluate.subjects import Subject
from transmla.evaluate.text import TextPart
from transmla.progress import Progress, Silent


class Part(Protocol):
    """A part of the report: it is shown every model, the source first, and says in the end what it has found."""

    field: str

    def measure(self, subject: Subject, progress: Progress) -> None:
        """Look at a model."""
        ...

    def report(self) -> Sequence[Any]:
        """Say what was found; goes into ``field`` of the report, behind what other parts have put there."""
        ...


def evaluate(request: EvalRequest, *, progress: Progress | None = None) -> EvalReport:
    """Measure everything that is asked for, of every model.

    Raises:
        TransMLAError: a model, the data or the device cannot be used, or a loss is not finite.
    """
    progress = progress or Silent()
    device = choose_device(request.device)
    found = find_models(request)
    check_comparable(found, window=request.window if request.dataset else 1)
    with open_results(lasting=not request.no_cache) as results:
        subjects = [Subject(model, results.fingerprint(model), request.dtype, device) for model in found]
        parts = list(_parts(request, subjects[0], results))
        for subject in subjects:
            for part in parts:
                part.measure(subject, progress)
            # The source is what the others are compared with.
            if subject is not subjects[0]:
                subject.forget()
    fields: dict[str, list[Any]] = {}
    for part in parts:
        fields.setdefault(part.field, []).extend(part.report())
    return EvalReport.model_validate(
        {**fields, "dtype": request.dtype, "device": str(device), "versions": loaded_versions()}
    )


def _parts(request: EvalRequest, source: Subject, results: Results) -> Iterator[Part]:
    yield CostPart(results=results)
    if not request.dataset:
        raise UsageError("There is nothing to measure: pass --dataset.")
    tokenizer = load_tokenizer(source.found)
    for dataset in request.dataset:
        passages = read_passages(
            dataset,
            tokenizer,
            window=request.window,
            stride=request.stride,
            per_document=request.per_document,
            max_tokens=request.max_tokens,
            text_column=request.text_column,
        )
        yield TextPart(
            dataset, protocol(request), passages, results=results, source=source, batch_size=request.batch_size
        )


def protocol(request: EvalRequest) -> str:
    """Say how a text is cut."""
    words = "each document by itself, up to" if request.per_document else "windows of"
    overlap = request.stride is not None and request.stride < request.window
    return f"{words} {request.window} tokens" + (f", stride {request.stride}" if overlap else "")
