"""Time a step of decoding on a long context: a source, its conversion in plain Transformers, and the same one absorbed.

The steps take turns in one process, for a machine's speed changes with what else it does; every step has as many cached
tokens as the others, and of every turn the first step is not counted. The conversion's two forms use one cache.

    python scripts/bench_decode.py SOURCE CONVERTED [--gguf-file NAME] [--context 8192] [--rounds 8]
"""

from __future__ import annotations

import argparse
import platform
import statistics
import time
from collections.abc import Callable

import torch
from transformers import Cache, DynamicCache, PreTrainedModel
from transformers.utils import logging

from transmla.checkpoint.source import open_source
from transmla.device import choose_device
from transmla.evaluate.models import load_model
from transmla.modeling import absorb, expand


def read_prompt(model: PreTrainedModel, ids: torch.Tensor) -> tuple[Cache, float]:
    """Return the cache of a prompt, and the seconds that it took."""
    cache, started = DynamicCache(config=model.config), time.perf_counter()
    model(ids, past_key_values=cache, logits_to_keep=1).logits.cpu()
    return cache, time.perf_counter() - started


def time_turn(
    model: PreTrainedModel, cache: Cache, token: torch.Tensor, steps: int
) -> tuple[list[float], torch.Tensor]:
    """Return the milliseconds of some steps but the first, and the logits."""
    times = []
    for _ in range(steps + 1):
        started = time.perf_counter()
        logits = model(token, past_key_values=cache).logits.cpu()  # which waits for a GPU
        times.append(1000 * (time.perf_counter() - started))
        cache.crop(-1)
    return times[1:], logits


def main() -> None:
    """Measure, then print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source")
    parser.add_argument("converted")
    parser.add_argument("--gguf-file")
    parser.add_argument("--context", type=int, default=8192, help="tokens that a step attends to")
    parser.add_argument("--batch-size", type=int, default=1)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    options = parser.parse_args()
    logging.disable_progress_bar()
    torch.set_num_threads(options.threads)
    torch.set_grad_enabled(False)

    device = choose_device(options.device)
    source, converted = (
        load_model(open_source(name, gguf_file=gguf_file), dtype=options.dtype, device=device)
        for name, gguf_file in ((options.source, options.gguf_file), (options.converted, None))
    )
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(source.config.vocab_size, (options.batch_size, options.context), generator=generator).to(device)
    caches, prompts = {}, {}
    for model in (source, converted):
        caches[model], prompts[model] = read_prompt(model, ids[:, :-1])

    # Turns are short where steps are: the slow form would otherwise take most of the time.
    forms: dict[str, tuple[PreTrainedModel, Callable[[PreTrainedModel], PreTrainedModel], int]] = {
        "source": (source, lambda model: model, 4),
        "absorbed": (converted, absorb, 4),
        "plain": (converted, expand, 2),
    }
    times: dict[str, list[float]] = {form: [] for form in forms}
    logits = {}
    for _ in range(options.rounds):
        for form, (model, prepare, steps) in forms.items():
            measured, logits[form] = time_turn(prepare(model), caches[model], ids[:, -1:], steps)
            times[form] += measured

    median = {form: statistics.median(measured) for form, measured in times.items()}
    where = f"{options.threads} threads, {platform.machine()}" if device.type == "cpu" else device
    print(f"{options.batch_size} x {options.context} tokens, {options.dtype}, {where}, torch {torch.__version__}")
    print(f"{'':10}{'ms a step':>12}{'least':>10}{'cache MB':>12}{'prompt s':>12}")
    for form, (model, _, _) in forms.items():
        megabytes = sum(layer.keys.nbytes + layer.values.nbytes for layer in caches[model].layers) / 1e6
        prompt = "" if form == "plain" else f"{prompts[model]:.1f}"
        print(f"{form:10}{median[form]:12.1f}{min(times[form]):10.1f}{megabytes:12.1f}{prompt:>12}")
    print(f"absorbed: {median['plain'] / median['absorbed']:.1f} times as fast as plain Transformers, ", end="")
    print(f"{median['source'] / median['absorbed']:.2f} times as fast as the source; ", end="")
    print(f"logits differ by {(logits['absorbed'] - logits['plain']).abs().max():.1e}")


if __name__ == "__main__":
    main()
