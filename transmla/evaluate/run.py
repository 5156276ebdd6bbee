"""The evaluation from request to report.

Read top to bottom: find the models, refuse what cannot be compared, cut the text, then measure. At most the source and
one converted model are in memory; the source runs again beside each converted model, because keeping its distributions
would take a vocabulary's worth of numbers for every token.
"""

from __future__ import annotations

import hashlib

from jaxtyping import Int
from torch import Tensor
from transformers import PreTrainedModel

from transmla.calibration.text import consecutive_windows, load_tokenizer, open_documents
from transmla.checkpoint.source import Source
from transmla.config import EvalRequest
from transmla.device import choose_device
from transmla.evaluate.cache import measure_cache
from transmla.evaluate.models import check_comparable, find_models, loaded_versions
from transmla.evaluate.report import DataReport, EvalReport, ModelReport
from transmla.evaluate.scores import Agreement, Loss, measure_agreement, measure_loss
from transmla.modeling.load import load_model
from transmla.progress import Progress, Silent


def evaluate(request: EvalRequest, *, progress: Progress | None = None) -> EvalReport:
    """Measure perplexity, agreement with the source, and the cache of every model asked for.

    Raises:
        TransMLAError: a model, the text or the device cannot be used, or a loss is not finite.
    """
    progress = progress or Silent()
    device = choose_device(request.device)
    found, *others = find_models(request)
    check_comparable([found, *others], window=request.window)
    windows = _read_windows(request, found)

    source = load_model(found, dtype=request.dtype, device=device)
    losses: list[Loss] = []
    converted: list[ModelReport] = []
    for other in others:
        model = load_model(other, dtype=request.dtype, device=device)
        with progress.task(f"Comparing {other.name}", len(windows)) as advance:
            agreement = measure_agreement(source, model, windows, batch_size=request.batch_size, advance=advance)
        losses.append(agreement.source)
        converted.append(_describe_model(model, agreement.converted, agreement))
        # Before the next one is loaded, not after.
        del model
    if not losses:
        with progress.task(f"Evaluating {found.name}", len(windows)) as advance:
            losses.append(measure_loss(source, windows, batch_size=request.batch_size, advance=advance))

    return EvalReport(
        source=_describe_model(source, losses[0]),
        converted=tuple(converted),
        data=_describe_data(request.dataset, windows),
        dtype=request.dtype,
        device=str(device),
        versions=loaded_versions(),
    )


def _read_windows(request: EvalRequest, source: Source) -> Int[Tensor, "windows window"]:
    documents = open_documents(request.dataset, text_column=request.text_column)
    tokenizer = load_tokenizer(source)
    return consecutive_windows(documents, tokenizer, window=request.window, max_tokens=request.max_tokens)


def _describe_model(model: PreTrainedModel, loss: Loss, agreement: Agreement | None = None) -> ModelReport:
    cache = measure_cache(model)
    return ModelReport(
        name=model.name_or_path,
        perplexity=loss.perplexity,
        nll=loss.nll,
        excess_nll=agreement.excess_nll if agreement else None,
        kl=agreement.kl if agreement else None,
        top1_agreement=agreement.top1_agreement if agreement else None,
        kv_bytes_per_token=cache.bytes_per_token,
        kv_numbers_per_token_layer=cache.numbers_per_token_layer,
        num_parameters=sum(parameter.numel() for parameter in model.parameters()),
    )


def _describe_data(dataset: str, windows: Int[Tensor, "windows window"]) -> DataReport:
    num_windows, window = windows.shape
    return DataReport(
        dataset=dataset,
        num_tokens=num_windows * window,
        num_windows=num_windows,
        window=window,
        num_positions=num_windows * (window - 1),
        sha256=hashlib.sha256(windows.numpy().astype("<i8").tobytes()).hexdigest(),
    )
