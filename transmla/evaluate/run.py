"""The evaluation from request to report.

Read top to bottom: find the models, refuse what cannot be compared, read the data, then go from model to model and
measure all parts of the report. At most the source and one converted model are in memory, and neither where everything
about it is known from an earlier run.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from transformers import PreTrainedTokenizerBase

from transmla.checkpoint.source import Source
from transmla.checkpoint.stamps import model_stamp
from transmla.config import EvalRequest
from transmla.data.text import load_tokenizer
from transmla.data.tokens import check_known, text_start
from transmla.data.vocabulary import SharedTokens
from transmla.device import choose_device
from transmla.errors import UsageError
from transmla.evaluate.lazy_model import LazyModel
from transmla.evaluate.parts import PARTS
from transmla.evaluate.parts.base import Part, Setting
from transmla.evaluate.report.report import EvalReport
from transmla.evaluate.result_cache import ResultCache, open_result_cache
from transmla.evaluate.windows import ScoredWindows, read_windows
from transmla.modeling.compare import check_comparable, find_models, told_of_vocabularies
from transmla.modeling.load import read_config
from transmla.progress import Progress, Silent, say_nothing
from transmla.records import FORMAT_VERSION, Record
from transmla.versions import loaded_versions


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
    wanted = _wanted_parts(request)
    device = choose_device(request.device)
    found = find_models(request)
    longest, flag = max(part.longest(request) for part in wanted)
    tokens = check_comparable(found, window=longest, flag=flag)
    for sentence in told_of_vocabularies(found, tokens):
        tell(sentence)
    with open_result_cache(lasting=not request.no_cache) as results:
        lazy_models = [_lazy_model(model, request, device, results) for model in found]
        setting = _setting(request, lazy_models[0], results, tokens, device, progress, tell)
        parts = [part for kind in wanted for part in kind.build(setting)]
        for lazy in lazy_models:
            for part in parts:
                part.measure(lazy, progress)
            # The source is what the others are compared with.
            if lazy is not lazy_models[0]:
                lazy.unload()
        lazy_models[0].unload()
    fields: dict[str, list[Record]] = {}
    for part in parts:
        fields.setdefault(part.name, []).extend(part.report())
    about = {"format_version": FORMAT_VERSION, "dtype": request.dtype, "device": str(device)}
    return EvalReport.model_validate({**fields, **about, "versions": loaded_versions()})


def _lazy_model(found: Source, request: EvalRequest, device: torch.device, results: ResultCache) -> LazyModel:
    # Before the hash: whatever is put in their place from now on is noticed.
    stamp = model_stamp(found.folder)
    return LazyModel(found, results.fingerprint(found), request.dtype, device, request.batch_size, stamp)


def _wanted_parts(request: EvalRequest) -> list[type[Part]]:
    """Return what a request asks for, checked.

    Raises:
        TransMLAError: nothing, or what cannot be measured.
    """
    wanted = [part for part in PARTS.values() if part.wanted(request)]
    if not any(part.flags for part in wanted):
        flags = [flag for part in PARTS.values() if not part.on_first_text for flag in part.flags]
        raise UsageError(f"There is nothing to measure: pass {', '.join(flags[:-1])} or {flags[-1]}.")
    for part in wanted:
        part.check(request)
    return wanted


def _setting(
    request: EvalRequest,
    source: LazyModel,
    results: ResultCache,
    shared: Mapping[str, SharedTokens],
    device: torch.device,
    progress: Progress,
    tell: Callable[[str], None],
) -> Setting:
    tokenizer, vocab_size = load_tokenizer(source.found), read_config(source.found).vocab_size
    texts = {dataset: _read(dataset, request, tokenizer) for dataset in request.dataset}
    for windows in texts.values():
        check_known(torch.cat(windows.tokens), vocab_size=vocab_size)
        for sentence in filter(None, (windows.reading.sentence(), windows.sentence())):
            tell(sentence)
    return Setting(
        request=request,
        source=source,
        cache=results,
        tokenizer=tokenizer,
        vocab_size=vocab_size,
        texts=texts,
        shared=shared,
        start=text_start(tokenizer, request.bos),
        device=device,
        progress=progress,
        tell=tell,
    )


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
