"""Measure the peak memory of ``transmla convert`` beside what its plan says, one process a conversion, mode by mode.

    python scripts/benchmarks/memory.py
    python scripts/benchmarks/memory.py --only heal exact-7b --markdown

Measured is the resident memory of the whole process at its highest, as the system reports it; said is
``peak_memory_bytes`` of the plan in the report, the constant for the libraries included. Two layers of each shape are
converted, for the peak does not depend on how many there are. Where weights decide nothing they are holes in a file.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import platform
import sys
import tempfile
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from scripts.benchmarks.convert import measure

_MIDDLE = {
    "hidden_size": 1024,
    "intermediate_size": 3072,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "head_dim": 64,
    "vocab_size": 4096,
}
# Moments are small in it, so that other stages count.
_FEW_KEYS = {**_MIDDLE, "hidden_size": 2048, "num_attention_heads": 32, "num_key_value_heads": 2}
_7B = {
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_attention_heads": 32,
    "num_key_value_heads": 32,
    "head_dim": 128,
    "vocab_size": 32000,
    "rms_norm_eps": 1e-5,
}
_8B = {**_7B, "intermediate_size": 14336, "num_key_value_heads": 8, "vocab_size": 128256}
_1B = {**_8B, "hidden_size": 2048, "intermediate_size": 8192, "head_dim": 64}
_QWEN = {**_7B, "hidden_size": 3584, "intermediate_size": 18944, "num_attention_heads": 28, "num_key_value_heads": 4}
_SIZES = "--kv-lora-rank 256 --qk-rope-head-dim 64"
_FIT = f"{_SIZES} --calibration TEXT --num-windows 12 --num-heldout-windows 4"
_FEW_SIZES = "--kv-lora-rank 64 --qk-rope-head-dim 32"
_FIT_FEW = f"{_FEW_SIZES} --calibration TEXT --num-windows 12 --num-heldout-windows 4"
_NONE = f"{_SIZES} --calibration none"


@dataclass(frozen=True)
class Run:
    """A shape and the flags of its conversion; ``TEXT`` stands for the text."""

    flags: str
    shape: dict[str, Any] = field(default_factory=lambda: _MIDDLE)
    family: str = "llama"
    dtype: str = "bfloat16"
    holes: bool = False


RUNS: dict[str, Run] = {
    "exact-7b": Run("--exact", _7B, holes=True),
    "exact-7b-float16": Run("--exact --dtype bfloat16", _7B, dtype="float16", holes=True),
    "exact-8b": Run("--exact", _8B, holes=True),
    "exact-8b-float32": Run("--exact --dtype float32", _8B, dtype="float16", holes=True),
    "exact-qwen2-7b": Run("--exact", _QWEN, family="qwen2", holes=True),
    "exact-mixtral": Run("--exact --calibration TEXT --num-windows 12", family="mixtral"),
    "none-rorope-8b": Run("--kv-ratio 0.25 --calibration none --method rorope", _8B),
    "none": Run(_NONE),
    "none-rorope": Run(f"{_NONE} --method rorope"),
    "rorope": Run(f"{_FIT} --method rorope"),
    "fit": Run(_FIT),
    "fit-float32": Run(_FIT, dtype="float32"),
    "fit-float16": Run(f"{_FIT} --dtype bfloat16", dtype="float16"),
    "fit-compute-bfloat16": Run(f"{_FIT} --compute-dtype bfloat16"),
    "fit-quantizable": Run(f"{_FIT} --profile quantizable"),
    "fit-batch-2": Run(f"{_FIT} --batch-size 2"),
    "fit-many-windows": Run(f"{_SIZES} --calibration TEXT --num-windows 128 --batch-size 32"),
    "fit-long-windows": Run(f"{_SIZES} --calibration TEXT --num-windows 4 --num-heldout-windows 2 --window 2048"),
    "fit-large-vocabulary": Run(_FIT, {**_MIDDLE, "vocab_size": 200_000, "rms_norm_eps": 1e-5}),
    "ratio": Run("--kv-ratio 0.3 --calibration TEXT --num-windows 12 --num-heldout-windows 4"),
    "heal": Run(f"{_FIT} --heal-steps 2"),
    "fitted-norm": Run(f"{_FIT} --latent-norm fitted"),
    "q-lora-rank": Run(f"{_FIT} --q-lora-rank 256"),
    "qwen2-keep": Run(_FIT, family="qwen2"),
    "qwen2-merge": Run(f"{_FIT} --biases merge", family="qwen2"),
    "qwen3": Run(_FIT, family="qwen3"),
    "qwen3-heal": Run(f"{_FIT} --heal-steps 2", family="qwen3"),
    "mixtral": Run(_FIT, family="mixtral"),
    "few-keys": Run(_FIT_FEW, _FEW_KEYS),
    "few-keys-none": Run(f"{_FEW_SIZES} --calibration none", _FEW_KEYS),
    "few-keys-heal": Run(f"{_FIT_FEW} --heal-steps 2 --batch-size 12", _FEW_KEYS),
    "few-keys-heal-bfloat16": Run(f"{_FIT_FEW} --heal-steps 2 --compute-dtype bfloat16", _FEW_KEYS),
    "few-keys-fitted-norm": Run(f"{_FIT_FEW} --latent-norm fitted", _FEW_KEYS),
    "few-keys-q-lora-rank": Run(f"{_FIT_FEW} --q-lora-rank 512", _FEW_KEYS),
    "few-keys-qwen2": Run(_FIT_FEW, _FEW_KEYS, family="qwen2"),
    "few-keys-qwen3": Run(_FIT_FEW, _FEW_KEYS, family="qwen3"),
    "few-keys-long-windows": Run(
        f"{_FEW_SIZES} --calibration TEXT --num-windows 4 --num-heldout-windows 2 --window 1024", _FEW_KEYS
    ),
    "few-keys-many-windows": Run(f"{_FEW_SIZES} --calibration TEXT --num-windows 128", _FEW_KEYS),
    "few-keys-mixtral": Run(_FIT_FEW, _FEW_KEYS, family="mixtral"),
    "fit-1b": Run(_FIT, _1B),
}


def make(folder: Path, run: Run) -> None:
    """Write the checkpoint, and a tokenizer and a text where there is one to read."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM
    from transformers.utils import logging

    from tests.support.holes import make_holes

    logging.disable_progress_bar()
    torch.manual_seed(0)
    shape = {**run.shape, "num_hidden_layers": 2, "tie_word_embeddings": False}
    if run.family in ("qwen2", "qwen3"):
        shape["use_sliding_window"] = False
    if run.family == "mixtral":
        shape |= {"num_local_experts": 8, "sliding_window": None}
    dtype = getattr(torch, run.dtype)
    config = AutoConfig.for_model(run.family, **shape, dtype=dtype, max_position_embeddings=4096)
    if run.holes:
        make_holes(folder, config, dtype=dtype)
    else:
        AutoModelForCausalLM.from_config(config, dtype=dtype).save_pretrained(folder)
    make_text(folder)


def make_text(folder: Path) -> None:
    """Put a tokenizer of single bytes into a model's folder, which any family's class reads, and a text beside it."""
    import random

    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {byte: index for index, byte in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    tokenizer = Tokenizer(models.BPE(vocabulary, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(folder)
    text = "".join(random.Random(0).choices("abcdefghij klmnop", k=200_000))
    folder.with_suffix(".txt").write_text(text, encoding="utf-8")


def bench(name: str, scratch: Path, *, threads: int) -> dict[str, Any]:
    """Convert once and return what was said and what was measured, in MB."""
    run, folder, output = RUNS[name], scratch / "source", scratch / "converted"
    # In a process that is gone afterwards, and its memory with it.
    maker = multiprocessing.get_context("spawn").Process(target=make, args=(folder, run))
    maker.start()
    maker.join()
    if maker.exitcode:
        sys.exit(f"The checkpoint of {name} could not be made.")
    flags = [str(folder.with_suffix(".txt")) if word == "TEXT" else word for word in run.flags.split()]
    command = [sys.executable, "-m", "transmla", "convert", str(folder), str(output), *flags]
    measured = measure(command, threads=threads)["peak_mb"]
    plan = json.loads((output / "transmla_report.json").read_text(encoding="utf-8"))["plan"]
    said = round(plan["peak_memory_bytes"] / 1e6)
    return {
        "name": name,
        "family": run.family,
        "dtype": run.dtype,
        "flags": run.flags,
        "said_mb": said,
        "measured_mb": measured,
        "off": round(said / measured - 1, 3),
    }


def main() -> None:
    """Bench, and print each row as it comes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=RUNS, metavar="NAME", default=list(RUNS), help=", ".join(RUNS))
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--markdown", action="store_true", help="print a table of a page instead of JSON lines")
    options = parser.parse_args()
    versions = {"python": platform.python_version()}
    versions |= {name: version(name) for name in ("transmla", "torch", "transformers")}
    print(json.dumps({"cores": os.cpu_count(), "threads": options.threads, **versions}), file=sys.stderr)
    if options.markdown:
        print("| run | family, stored as | flags | said, MB | measured, MB | off |\n|---|---|---|---|---|---|")
    for name in options.only:
        with tempfile.TemporaryDirectory(prefix="bench-memory-") as scratch:
            row = bench(name, Path(scratch), threads=options.threads)
        if options.markdown:
            cells = f"| {name} | {row['family']}, {row['dtype']} | `{row['flags']}` |"
            print(f"{cells} {row['said_mb']:,} | {row['measured_mb']:,} | {row['off']:+.0%} |", flush=True)
        else:
            print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
