"""Speed and memory against context length, of a source and its conversions, side by side.

The prompts are random tokens: how long a step takes does not depend on what the tokens say.
"""

from __future__ import annotations

import platform
from collections.abc import Iterator, Sequence
from functools import partial
from statistics import median
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from transmla.bench.interleave import Runs, Variant, run_interleaved, variants_of
from transmla.bench.report import BenchCell, BenchModel, BenchReport, paired_speedup
from transmla.bench.timing import run_prompt
from transmla.checkpoint.source import Source
from transmla.config import BenchRequest
from transmla.device import choose_device
from transmla.errors import UsageError
from transmla.modeling.compare import check_comparable, find_models
from transmla.modeling.load import load_model, read_config
from transmla.progress import Progress, Silent
from transmla.versions import loaded_versions


def bench(request: BenchRequest, *, progress: Progress | None = None) -> BenchReport:
    """Measure every model at every context length and batch size.

    Raises:
        TransMLAError: a model or the device cannot be used, or a context is too short or too long.
    """
    progress = progress or Silent()
    device = choose_device(request.device)
    contexts, batch_sizes = sorted(set(request.contexts)), sorted(set(request.batch_sizes))
    found = _find_comparable(request, contexts)
    dtype = settle_dtype(request.dtype, found[0])
    variants = [
        variant for model in found for variant in variants_of(model.name, load_model(model, dtype=dtype, device=device))
    ]

    cells: list[BenchCell] = []
    num_runs = len(contexts) * len(batch_sizes) * (request.num_rounds + 1) * len(variants)
    with progress.task("Measuring", num_runs) as advance:
        for context in contexts:
            for batch_size in batch_sizes:
                prompt = random_prompt(
                    min(variant.model.config.vocab_size for variant in variants),
                    batch_size=batch_size,
                    num_tokens=context - request.num_new_tokens,
                    seed=request.seed,
                ).to(device)
                work = partial(run_prompt, prompt=prompt, num_new_tokens=request.num_new_tokens)
                results = run_interleaved(variants, work, num_rounds=request.num_rounds, advance=advance)
                cells += make_cells(variants, results, prompt, num_new_tokens=request.num_new_tokens)
    return BenchReport(
        models=tuple(_describe(variant) for variant in variants),
        cells=tuple(cells),
        num_new_tokens=request.num_new_tokens,
        num_rounds=request.num_rounds,
        seed=request.seed,
        dtype=dtype,
        device=str(device),
        machine=describe_machine(device),
        num_threads=torch.get_num_threads(),
        versions=loaded_versions(),
    )


def _find_comparable(request: BenchRequest, contexts: Sequence[int]) -> list[Source]:
    if contexts[0] <= request.num_new_tokens:
        raise UsageError(
            f"A context of {contexts[0]} tokens has no room for a prompt and {request.num_new_tokens} new tokens: "
            "raise --contexts, or lower --num-new-tokens."
        )
    found = find_models(request)
    check_comparable(found, window=contexts[-1], flag="--contexts")
    return found


def settle_dtype(dtype: str, source: Source) -> str:
    """Return the type that all models run in: ``auto`` is what the source is stored in."""
    if dtype != "auto":
        return dtype
    stored = read_config(source).dtype
    return "float32" if stored is None else str(stored).removeprefix("torch.")


def random_prompt(vocab_size: int, *, batch_size: int, num_tokens: int, seed: int) -> Int[Tensor, "batch tokens"]:
    """Draw the tokens of a batch of prompts."""
    return torch.randint(vocab_size, (batch_size, num_tokens), generator=torch.Generator().manual_seed(seed))


def make_cells(
    variants: Sequence[Variant],
    results: Sequence[Runs],
    prompt: Int[Tensor, "batch tokens"],
    *,
    num_new_tokens: int,
) -> Iterator[BenchCell]:
    """Turn the runs of :func:`run_interleaved` into records, compared with the first variant's."""
    batch_size, num_tokens = prompt.shape
    source = results[0]
    for variant, runs in zip(variants, results, strict=True):
        place: dict[str, Any] = {"model": variant.name, "form": variant.form, "batch_size": batch_size}
        place["context"] = num_tokens + num_new_tokens
        if runs.problem is not None:
            yield BenchCell(**place, problem=runs.problem)
            continue
        compared, measured = source.problem is None, runs.runs[0]
        yield BenchCell(
            **place,
            first_token_rounds=runs.first_seconds,
            decode_rounds=runs.decode_seconds,
            seconds_to_first_token=median(runs.first_seconds),
            decode_tokens_per_second=batch_size * num_new_tokens / median(runs.decode_seconds),
            first_token_speedup=paired_speedup(source.first_seconds, runs.first_seconds) if compared else None,
            decode_speedup=paired_speedup(source.decode_seconds, runs.decode_seconds) if compared else None,
            cache_bytes=measured.cache_bytes,
            peak_bytes_first_token=variant.weight_bytes + measured.first_bytes,
            peak_bytes_decode=variant.weight_bytes + measured.decode_bytes,
        )


def _describe(variant: Variant) -> BenchModel:
    return BenchModel(
        name=variant.name,
        architecture=type(variant.model).__name__,
        form=variant.form,
        num_parameters=variant.model.num_parameters(),
        weight_bytes=variant.weight_bytes,
    )


def describe_machine(device: torch.device) -> str:
    """Name what computes: the GPU, or system and processor."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{platform.system()} {platform.machine()}"
