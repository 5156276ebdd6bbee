"""Decoding of an 8B-shaped model with random weights: GQA, and MLA of 512 + 64 as stock has it and absorbed.

For each context and batch: tokens per second, the fraction of what the memory's bandwidth allows (every weight and the
cache read once a step), and the largest batch that fits. No checkpoint is needed: the models are made on the device,
share all weights outside attention, and find their cache filled with random numbers.

    python scripts/benchmarks/decoding_8b.py --json > report.json
    python scripts/benchmarks/decoding_8b.py --small

The cache has room for new tokens, as in serving engines; --stock-cache measures transformers' own, which is copied at
every step. A fraction above 1 means that the model is small enough for the processor's caches.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedConfig, PreTrainedModel

from transmla.arch.spec import describe
from transmla.bench.interleave import Runs, Variant, run_interleaved, variants_of
from transmla.bench.memory import free_memory
from transmla.bench.report import paired_speedup
from transmla.bench.run import describe_machine
from transmla.deepseek.config import load_target, target_config
from transmla.deepseek.neutral_norm import NORMS
from transmla.deepseek.sizes import MLASizes
from transmla.deepseek.target_spec import TargetSpec
from transmla.device import choose_device
from transmla.errors import TransMLAError
from transmla.versions import loaded_versions

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from scripts.benchmarks.bandwidth import bytes_per_step, measure_bandwidth
from scripts.benchmarks.filled_cache import run_filled

SHAPES: dict[str, dict[str, Any]] = {
    "8B": {
        "vocab_size": 128256,
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "kv_lora_rank": 512,
        "qk_rope_head_dim": 64,
        "contexts": [4096, 16384, 32768, 65536, 131072],
        "batch_sizes": [1, 4, 16, 64],
        "num_new_tokens": 16,
        "dtype": "bfloat16",
        "bandwidth_bytes": 2**32,
    },
    "small": {
        "vocab_size": 4096,
        "hidden_size": 512,
        "intermediate_size": 1792,
        "num_hidden_layers": 2,
        "num_attention_heads": 16,
        "num_key_value_heads": 4,
        "head_dim": 64,
        "kv_lora_rank": 128,
        "qk_rope_head_dim": 32,
        "contexts": [1024, 4096],
        "batch_sizes": [1, 4],
        "num_new_tokens": 8,
        "dtype": "float32",
        "bandwidth_bytes": 2**28,
    },
}


def make_configs(options: argparse.Namespace) -> tuple[PreTrainedConfig, PreTrainedConfig]:
    """Return the source's config and that of its conversion, which are alike but for attention."""
    names = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers")
    heads = ("num_attention_heads", "num_key_value_heads", "head_dim")
    source = LlamaConfig(
        **{name: getattr(options, name) for name in (*names, *heads)},
        max_position_embeddings=max(options.contexts),
        rope_parameters={"rope_type": "default", "rope_theta": 500000.0},
        tie_word_embeddings=False,
    )
    sizes = MLASizes(
        kv_lora_rank=options.kv_lora_rank,
        qk_rope_head_dim=options.qk_rope_head_dim,
        qk_nope_head_dim=options.head_dim,
        v_head_dim=options.head_dim,
    )
    dtype = getattr(torch, options.dtype)
    spec = TargetSpec.of(describe(source), keep_biases=True, keep_scaling=False)
    return source, load_target(target_config(source, spec, sizes, NORMS["portable"], dtype=dtype, exact=False))


def make_models(options: argparse.Namespace, device: torch.device) -> list[PreTrainedModel]:
    """Make both models on the device; the second takes every weight outside attention from the first."""
    torch.manual_seed(options.seed)
    with device:
        source, target = (
            AutoModelForCausalLM.from_config(config, dtype=getattr(torch, options.dtype)).eval()
            for config in make_configs(options)
        )
    target.lm_head = source.lm_head
    target.model.embed_tokens = source.model.embed_tokens
    for ours, theirs in zip(target.model.layers, source.model.layers, strict=True):
        ours.mlp = theirs.mlp
    return [source, target]


def measure(variants: list[Variant], options: argparse.Namespace, capacity: float) -> Iterator[dict[str, Any]]:
    """Yield a row for each context, batch size and variant; ``capacity`` is the bytes that a device has."""
    for context in options.contexts:
        peaks: dict[int, list[tuple[int, int]]] = {}
        rows = []
        # Two small batches, whether asked for or not, to tell what a sequence more takes.
        for batch_size in sorted({1, 2, *options.batch_sizes}):
            print(f"Context {context:,}, batch {batch_size}", file=sys.stderr)
            work = partial(
                run_filled,
                context=context,
                batch_size=batch_size,
                num_new_tokens=options.num_new_tokens,
                roomy=not options.stock_cache,
            )
            results = run_interleaved(variants, work, num_rounds=options.num_rounds)
            for index, (variant, runs) in enumerate(zip(variants, results, strict=True)):
                if runs.runs:
                    peaks.setdefault(index, []).append((batch_size, runs.runs[0].decode_bytes))
                if batch_size in options.batch_sizes:
                    row = {"context": context, "batch_size": batch_size, "model": title(variant)}
                    rows.append((index, row | describe_turns(variant, runs, results[0], batch_size, options)))
        for index, row in rows:
            row["largest_batch"] = largest_batch(peaks.get(index, []), capacity - variants[index].weight_bytes)
            yield row


def describe_turns(
    variant: Variant, runs: Runs, source: Runs, batch_size: int, options: argparse.Namespace
) -> dict[str, Any]:
    """Return the measurements of a row, or the problem."""
    if runs.problem is not None:
        return {"problem": runs.problem}
    seconds = median(runs.decode_seconds) / options.num_new_tokens
    # The mean step meets a cache that lacks half of the new tokens.
    needed = bytes_per_step(variant.model, cache_bytes=runs.runs[0].cache_bytes)
    return {
        "tokens_per_second": batch_size / seconds,
        "speedup": paired_speedup(source.decode_seconds, runs.decode_seconds) if not source.problem else None,
        "bytes_per_step": needed,
        "gigabytes_per_second": needed / seconds / 1e9,
        "cache_bytes": runs.runs[0].cache_bytes,
        "peak_bytes": variant.weight_bytes + runs.runs[0].decode_bytes,
        "decode_seconds": runs.decode_seconds,
    }


def largest_batch(peaks: list[tuple[int, int]], free: float) -> int:
    """Return the batch that still fits beside the weights: memory measured on two batches grows linearly."""
    if not peaks:
        return 0
    if len(peaks) == 1:
        return peaks[0][0] if peaks[0][1] <= free else 0
    (first, at_first), (second, at_second) = peaks[0], peaks[1]
    each = (at_second - at_first) / (second - first)
    return max(0, int((free - at_first) / each + first))


def total_memory(device: torch.device) -> int:
    """Return the bytes of the device's memory."""
    return torch.cuda.get_device_properties(device).total_memory if device.type == "cuda" else free_memory()


def title(variant: Variant) -> str:
    """Name a variant by its attention."""
    if variant.model.config.model_type == "llama":
        return "GQA"
    return "MLA, absorbed" if variant.form == "absorbed" else "MLA, stock"


def print_table(report: dict[str, Any]) -> None:
    """Print the rows for people."""
    print(
        f"{report['machine']}, {report['dtype']}, {report['bandwidth'] / 1e9:.1f} GB/s by copying; "
        f"room for {report['memory_bytes'] / 1e9:.0f} GB; {report['cache']}"
    )
    print(f"{'context':>9}{'batch':>7}  {'':14}{'tokens/s':>10}{'x GQA':>7}{'of bound':>10}{'KV MB':>10}{'fits':>7}")
    for row in report["rows"]:
        place = f"{row['context']:>9,}{row['batch_size']:>7}  {row['model']:14}"
        if "problem" in row:
            print(f"{place}{row['problem']:>37}{row['largest_batch']:>7}")
            continue
        speedup = "-" if row["speedup"] is None else f"{row['speedup']:.2f}"
        print(
            f"{place}{row['tokens_per_second']:>10.1f}{speedup:>7}{row['fraction_of_bound']:>10.1%}"
            f"{row['cache_bytes'] / 1e6:>10,.1f}{row['largest_batch']:>7}"
        )


def read_options() -> argparse.Namespace:
    """Read the command line; the shape gives every default that it does not."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--small", action="store_true", help="a model and contexts small enough for a CPU")
    parser.add_argument("--num-layers", dest="num_hidden_layers", type=int)
    for name in ("vocab-size", "hidden-size", "intermediate-size", "num-attention-heads", "num-key-value-heads"):
        parser.add_argument(f"--{name}", type=int)
    for name in ("head-dim", "kv-lora-rank", "qk-rope-head-dim", "num-new-tokens", "bandwidth-bytes"):
        parser.add_argument(f"--{name}", type=int)
    parser.add_argument("--contexts", type=int, nargs="+", help="new tokens included")
    parser.add_argument("--batch-sizes", type=int, nargs="+")
    parser.add_argument("--num-rounds", type=int, default=3, help="timed, after one that warms up")
    parser.add_argument("--dtype", choices=["float32", "bfloat16", "float16"])
    parser.add_argument("--device", default="auto")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--stock-cache", action="store_true", help="transformers' own cache, copied at every step")
    parser.add_argument("--memory-gb", type=float, help="for the largest batch; the device's memory by default")
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    options = parser.parse_args()
    for name, value in SHAPES["small" if options.small else "8B"].items():
        if getattr(options, name) is None:
            setattr(options, name, value)
    if min(options.contexts) <= options.num_new_tokens:
        parser.error(f"--contexts must be longer than --num-new-tokens, which is {options.num_new_tokens}.")
    return options


def main() -> None:
    """Measure the memory's bandwidth before and after the models, then print a table or JSON."""
    options = read_options()
    try:
        device = choose_device(options.device)
        memory = options.memory_gb * 10**9 if options.memory_gb else total_memory(device)
        bandwidths = [measure_bandwidth(device, num_bytes=options.bandwidth_bytes)]
        models = make_models(options, device)
        rows = list(measure([entry for model in models for entry in variants_of("random", model)], options, memory))
        bandwidths.append(measure_bandwidth(device, num_bytes=options.bandwidth_bytes))
    except TransMLAError as error:
        sys.exit(f"Error: {error}")
    for row in rows:
        if "problem" not in row:
            row["fraction_of_bound"] = row["gigabytes_per_second"] * 1e9 / max(bandwidths)
    report = {
        "options": vars(options),
        "machine": describe_machine(device),
        "num_threads": torch.get_num_threads(),
        "dtype": options.dtype,
        "cache": "stock's cache, copied at every step" if options.stock_cache else "cache with room for new tokens",
        "memory_bytes": memory,
        "bandwidth": max(bandwidths),
        "bandwidths": bandwidths,
        "versions": loaded_versions().model_dump(),
        "rows": rows,
    }
    if options.json:
        print(json.dumps(report, indent=2))
    else:
        print_table(report)


if __name__ == "__main__":
    main()
