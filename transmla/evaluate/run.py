"""The evaluation from request to report.

Read top to bottom: find the models, refuse what cannot be compared, read the data, then go from model to model and
measure all parts of the report. At most the source and one converted model are in memory, and neither where everything
about it is known from an earlier run.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, Protocol

import torch
from transformers import PreTrainedTokenizerBase

from transmla.bench.report import BenchReport
from transmla.bench.run import bench
from transmla.checkpoint.source import Source
from transmla.checkpoint.stamps import model_stamp
from transmla.config import BenchRequest, ComparisonRequest, EvalRequest
from transmla.data.text import load_tokenizer
from transmla.data.tokens import check_known, text_start
from transmla.data.vocabulary import SharedTokens
from transmla.device import choose_device
from transmla.errors import UsageError
from transmla.evaluate.lazy_model import LazyModel
from transmla.evaluate.parts.cost import CostPart
from transmla.evaluate.parts.greedy import GreedyPart
from transmla.evaluate.parts.layerwise import LayerwisePart
from transmla.evaluate.parts.long_context import LongContextPart
from transmla.evaluate.parts.perplexity import PerplexityPart
from transmla.evaluate.parts.tasks import TasksPart, check_tasks
from transmla.evaluate.report.report import EvalReport
from transmla.evaluate.result_cache import ResultCache, open_result_cache
from transmla.evaluate.windows import ScoredWindows, read_windows
from transmla.modeling.compare import check_comparable, find_models, told_of_vocabularies
from transmla.modeling.load import read_config
from transmla.progress import Progress, Silent, say_nothing
from transmla.versions import loaded_versions

PROMPT_TOKENS = 64
"""Tokens of the windows behind which the source writes."""


class Part(Protocol):
    """A part of the report: it is shown every model, the source first, and says in the end what it has found."""

    field: str

    def measure(self, lazy: LazyModel, progress: Progress) -> None:
        """Look at a model."""
        ...

    def report(self) -> Iterable[Any]:
        """Say what was found; goes into ``field`` of the report, behind what other parts have put there."""
        ...


def evaluate(
    request: EvalRequest, *, progress: Progress | None = None, tell: Callable[[str], None] = say_nothing
) -> EvalReport:
    """Measure everything that is asked for, of every model.

    Args:
        request: what is wanted.
        progress: who is told how far the work has come.
        tell: is given what may not be as it was meant, a sentence each.

    Raises:
        TransMLAError: a model, the data or the device cannot be used, or a loss is not finite.
    """
    progress = progress or Silent()
    _check_request(request)
    device = choose_device(request.device)
    found = find_models(request)
    longest, flag = _longest(request)
    tokens = check_comparable(found, window=longest, flag=flag)
    for sentence in told_of_vocabularies(found, tokens):
        tell(sentence)
    with open_result_cache(lasting=not request.no_cache) as results:
        lazy_models = [_lazy_model(model, request, device, results) for model in found]
        parts = list(_parts(request, lazy_models[0], results, tokens, tell))
        for lazy in lazy_models:
            for part in parts:
                part.measure(lazy, progress)
            # The source is what the others are compared with.
            if lazy is not lazy_models[0]:
                lazy.unload()
        lazy_models[0].unload()
    fields: dict[str, list[Any]] = {}
    for part in parts:
        fields.setdefault(part.field, []).extend(part.report())
    if request.bench_contexts:
        # Never found again: how fast a machine is depends on the day.
        fields["speed"] = [_time(request, progress)]
    return EvalReport.model_validate(
        {**fields, "dtype": request.dtype, "device": str(device), "versions": loaded_versions()}
    )


def _lazy_model(found: Source, request: EvalRequest, device: torch.device, results: ResultCache) -> LazyModel:
    # Before the hash: whatever is put in their place from now on is noticed.
    stamp = model_stamp(found.folder)
    return LazyModel(found, results.fingerprint(found), request.dtype, device, request.batch_size, stamp)


def _time(request: EvalRequest, progress: Progress) -> BenchReport:
    shared = {name: getattr(request, name) for name in ComparisonRequest.model_fields}
    timing = BenchRequest(**shared, contexts=request.bench_contexts, dtype=request.dtype, device=request.device)
    return bench(timing, progress=progress)


def _parts(
    request: EvalRequest,
    source: LazyModel,
    results: ResultCache,
    tokens: Mapping[str, SharedTokens],
    tell: Callable[[str], None],
) -> Iterator[Part]:
    tokenizer = load_tokenizer(source.found)
    shared: dict[str, Any] = {"results": results, "batch_size": request.batch_size}
    vocab_size = read_config(source.found).vocab_size
    texts = {dataset: _read(dataset, request, tokenizer) for dataset in request.dataset}
    for windows in texts.values():
        check_known(torch.cat(windows.tokens), vocab_size=vocab_size)
        for sentence in filter(None, (windows.reading.sentence(), windows.sentence())):
            tell(sentence)
    yield CostPart(results=results)
    for dataset, windows in texts.items():
        said = protocol(request, windows, tokenizer)
        yield PerplexityPart(dataset, said, windows, source=source, shared=tokens, **shared)
    if request.tasks:
        if request.bos in ("always", "never"):
            tell(f"--bos {request.bos} does not reach --tasks, whose texts begin as the tokenizer has them.")
        yield TasksPart(
            request.tasks, tokenizer, source=source, num_fewshot=request.num_fewshot, limit=request.limit, **shared
        )
    if request.needle_lengths:
        yield LongContextPart(
            tokenizer,
            vocab_size=vocab_size,
            lengths=sorted(set(request.needle_lengths)),
            num_depths=request.needle_depths,
            num_trials=request.needle_trials,
            start=text_start(tokenizer, request.bos),
            **shared,
        )
    first = request.dataset[0] if request.dataset else ""
    if request.greedy_prompts:
        prompts = texts[first].starts(request.greedy_prompts, num_tokens=min(PROMPT_TOKENS, request.window))
        yield GreedyPart(first, prompts, source=source, num_new_tokens=request.greedy_tokens, **shared)
    if request.per_layer:
        yield LayerwisePart(first, texts[first].head(request.layer_windows), source=source, **shared)


def _read(dataset: str, request: EvalRequest, tokenizer: PreTrainedTokenizerBase) -> ScoredWindows:
    return read_windows(
        dataset,
        tokenizer,
        window=request.window,
        stride=request.stride,
        per_document=request.per_document,
        max_tokens=request.max_tokens,
        text_column=request.text_column,
        bos=request.bos,
    )


def _longest(request: EvalRequest) -> tuple[int, str]:
    """Return the most tokens that models must read at once, and the flag that says so."""
    lengths = [
        (max(request.needle_lengths, default=1), "--needle-lengths"),
        (max(request.bench_contexts, default=1), "--bench-contexts"),
    ]
    if request.dataset:
        lengths.append((request.window, "--window"))
    if request.greedy_prompts:
        lengths.append((min(PROMPT_TOKENS, request.window) + request.greedy_tokens, "--greedy-tokens"))
    return max(lengths)


def _check_request(request: EvalRequest) -> None:
    if not (request.dataset or request.tasks or request.needle_lengths or request.bench_contexts):
        raise UsageError("There is nothing to measure: pass --dataset, --tasks, --needle-lengths or --bench-contexts.")
    for flag, wanted in (("--greedy-prompts", request.greedy_prompts), ("--per-layer", request.per_layer)):
        if wanted and not request.dataset:
            raise UsageError(f"{flag} needs text: pass --dataset.")
        if wanted and not request.converted:
            raise UsageError(f"{flag} compares a source with conversions of it: pass CONVERTED.")
    check_tasks(request.tasks)


def protocol(request: EvalRequest, windows: ScoredWindows, tokenizer: PreTrainedTokenizerBase) -> str:
    """Say how a text is joined, cut and judged, which is what perplexities differ by."""
    said = [f"{'each document by itself, up to' if request.per_document else 'windows of'} {request.window} tokens"]
    if request.stride is not None and request.stride < request.window:
        said.append(f"stride {request.stride}")
    if windows.chats:
        said.append("chats as their template lays them out")
    elif windows.reading.columns and not request.per_document:
        said.append("rows joined by an empty line")
    start = tokenizer.decode(text_start(tokenizer, request.bos)) if request.bos != "never" else ""
    where = "the text" if request.bos == "once" else "each"
    said.append(f"{start} in front of {where}" if start else "no BOS")
    said.append("all but the first judged" if not start or request.bos == "once" else f"all after {start} judged")
    return ", ".join(said)
