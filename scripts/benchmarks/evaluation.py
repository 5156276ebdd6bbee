"""Is `transmla eval` as fast as reading a text can be, and are its numbers those of a plain loop?

In turns with it runs the shortest loop there is over stock transformers: batches through the model, and the mean of the
cross-entropies. Prints tokens per second, medians over the rounds and of the paired ratios, both perplexities, and the
most memory that either has in use for one batch, beside the weights.

Usage: python scripts/benchmarks/evaluation.py [--model MODEL] [--num-windows 8] [--window 1024] [--batch-size 2]
       [--num-rounds 3]
By default SmolLM2-135M and Wikipedia text, fetched by scripts/fetch_assets.py.
"""

from __future__ import annotations

import argparse
import math
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

import torch
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM, AutoTokenizer

from transmla.bench.memory import measure_memory
from transmla.checkpoint.source import open_source
from transmla.device import choose_device
from transmla.evaluate.token_scores import score_tokens
from transmla.evaluate.windows import ScoredWindows, read_windows

GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"


@torch.inference_mode()
def plain_perplexity(model: AutoModelForCausalLM, windows: torch.Tensor, batch_size: int) -> float:
    total = 0.0
    for batch in windows.split(batch_size):
        tokens = batch.to(model.device)
        logits = model(tokens).logits[:, :-1].flatten(0, 1).float()
        total += cross_entropy(logits, tokens[:, 1:].flatten(), reduction="sum").item()
    return math.exp(total / (windows.shape[0] * (windows.shape[1] - 1)))


def our_perplexity(model: AutoModelForCausalLM, windows: ScoredWindows, batch_size: int) -> float:
    return math.exp(score_tokens(model, windows, batch_size=batch_size)["nll"].mean(dtype="float64"))


def timed(work: Callable[[], float]) -> tuple[float, float]:
    started = time.perf_counter()
    return work(), time.perf_counter() - started


def peak_megabytes(work: Callable[[], float], device: torch.device) -> float:
    with measure_memory(device) as meter:
        work()
        return meter.lap() / 1e6


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model")
    parser.add_argument("--dataset")
    for name, value in (("num-windows", 8), ("window", 1024), ("batch-size", 2), ("num-rounds", 3)):
        parser.add_argument(f"--{name}", type=int, default=value)
    options = parser.parse_args()
    assets = Path()
    if options.model is None or options.dataset is None:
        fetch = [sys.executable, str(Path(__file__).parents[1] / "fetch_assets.py")]
        assets = Path(subprocess.run(fetch, check=True, stdout=subprocess.PIPE, text=True).stdout.strip())
    source = open_source(options.model) if options.model else open_source(str(assets / "smollm2"), gguf_file=GGUF)
    device = choose_device("auto")
    model = AutoModelForCausalLM.from_pretrained(source.folder, dtype=torch.float32).to(device).eval()
    windows = read_windows(
        options.dataset or str(assets / "wiki-test.txt"),
        AutoTokenizer.from_pretrained(source.folder),
        window=options.window,
        max_tokens=options.num_windows * options.window,
    )
    windows = torch.stack(windows.tokens)
    plain, ours = [], []
    for _ in range(options.num_rounds + 1):
        theirs, seconds = timed(lambda: plain_perplexity(model, windows, options.batch_size))
        plain.append(seconds)
        found, seconds = timed(lambda: our_perplexity(model, windows, options.batch_size))
        ours.append(seconds)
    # The first round warms up.
    plain, ours = plain[1:], ours[1:]
    batch = windows[: options.batch_size]
    first = windows.head(options.batch_size)
    for name, seconds, value, work in (
        ("plain loop", plain, theirs, lambda: plain_perplexity(model, batch, options.batch_size)),
        ("transmla eval", ours, found, lambda: our_perplexity(model, first, options.batch_size)),
    ):
        speed, peak = windows.numel() / median(seconds), peak_megabytes(work, device)
        print(f"{name:13} {speed:8.0f} tokens/s, {peak:6.0f} MB, perplexity {value:.6f}")
    print(
        f"ratio of speeds, median of {len(ours)} pairs: {median(p / o for p, o in zip(plain, ours, strict=True)):.3f}"
    )


if __name__ == "__main__":
    main()
