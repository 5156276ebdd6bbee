"""Measure what ``transmla convert`` costs: time and peak memory, each in a process of its own.

Beside it, just before and just after: a plain pass of the source over as many tokens. Two are the least that a
conversion can take, one of the source and one of the converted layers.

Without --model it makes random Llama checkpoints of growing depth, which shows what grows with depth and what does not.
What the libraries take is measured on a conversion of next to nothing; the peak that ``--dry-run`` predicts, for the
whole process as well, stands beside the measured one:

    python scripts/benchmarks/convert.py --depths 4 8 16 32 --threads 2 -- --method rorope
    python scripts/benchmarks/convert.py --depths 2 4 --hidden-size 2048
    python scripts/benchmarks/convert.py --model FOLDER --calibration text.txt -- --gguf-file model.gguf

Flags behind ``--`` go to ``transmla convert``.
"""

from __future__ import annotations

import argparse
import json
import math
import multiprocessing
import os
import platform
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

VOCAB_SIZE = 4096
# Batches as a conversion's; with the head and without, for a conversion has no use for it.
PLAIN = """
import json, sys, time, torch
from transformers import AutoModelForCausalLM
folder, gguf_file, windows, window = sys.argv[1], sys.argv[2] or None, int(sys.argv[3]), int(sys.argv[4])
model = AutoModelForCausalLM.from_pretrained(folder, gguf_file=gguf_file, dtype=torch.float32).eval()
ids = torch.randint(model.config.vocab_size, (windows, window)).split(8)
def seconds(run):
    started = time.perf_counter()
    for batch in ids:
        run(batch, use_cache=False)
    return time.perf_counter() - started
with torch.no_grad():
    model(ids[0])
    print(json.dumps({"plain_body": seconds(model.model), "plain": seconds(model)}))
"""


def measure(command: list[str], *, threads: int) -> dict[str, float]:
    """Run a command and return its wall time, its processor time and its peak memory.

    A child is charged with the memory of the process that it was forked from, so this process must stay small: it never
    imports torch.
    """
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
    with tempfile.TemporaryFile() as messages:
        started = time.perf_counter()
        child = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=messages, env=environment)
        # Not getrusage(RUSAGE_CHILDREN): that is the maximum over all children so far.
        _, status, usage = os.wait4(child.pid, 0)
        seconds = time.perf_counter() - started
        child.returncode = os.waitstatus_to_exitcode(status)
        messages.seek(0)
        if child.returncode:
            sys.exit(f"{' '.join(command)} failed:\n{messages.read().decode(errors='replace')}")
    unit = 1 if sys.platform == "darwin" else 1024
    return {
        "seconds": round(seconds, 2),
        "cpu_seconds": round(usage.ru_utime + usage.ru_stime, 2),
        "peak_mb": round(usage.ru_maxrss * unit / 1e6),
    }


def plain_pass(model: str, options: argparse.Namespace) -> dict[str, float]:
    """Return the seconds that stock transformers takes for as many tokens, without the head and with it."""
    gguf_file = options.flags[options.flags.index("--gguf-file") + 1] if "--gguf-file" in options.flags else ""
    # The held-out windows go through, too; eight of them unless a flag says otherwise, and repeats of both.
    windows = sum(count + round(options.repeats * count) for count in (options.num_windows, 8))
    command = [sys.executable, "-c", PLAIN, model, gguf_file, str(windows), str(options.window)]
    environment = {**os.environ, "OMP_NUM_THREADS": str(options.threads)}
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, env=environment)
    return json.loads(done.stdout)


def make_checkpoint(folder: Path, *, num_layers: int, hidden_size: int) -> None:
    """Write a random Llama with a tokenizer, and a text that it can be calibrated on beside it."""
    import random

    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
    from transformers.utils import logging

    logging.disable_progress_bar()
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=hidden_size,
        intermediate_size=3 * hidden_size,
        num_hidden_layers=num_layers,
        num_attention_heads=hidden_size // 64,
        num_key_value_heads=min(4, hidden_size // 64),
        head_dim=64,
    )
    LlamaForCausalLM(config).save_pretrained(folder, max_shard_size="32MB")

    words = [f"w{index}" for index in range(VOCAB_SIZE)]
    tokenizer = Tokenizer(models.WordLevel({word: index for index, word in enumerate(words)}, unk_token=words[0]))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token=words[0]).save_pretrained(folder)
    chosen = random.Random(0).choices(words, k=100_000)
    folder.with_suffix(".txt").write_text(" ".join(chosen), encoding="utf-8")


def describe(folder: Path) -> dict[str, float]:
    """Read depth, parameters and size off a folder with a config and safetensors; leave out what it does not have."""
    found = {}
    if (folder / "config.json").is_file():
        found["layers"] = json.loads((folder / "config.json").read_text(encoding="utf-8")).get("num_hidden_layers")
    shards = list(folder.glob("*.safetensors"))
    if shards:
        found["parameters"] = sum(count_parameters(shard) for shard in shards)
        found["checkpoint_mb"] = round(sum(shard.stat().st_size for shard in shards) / 1e6)
    return found


def count_parameters(shard: Path) -> int:
    """Add up the shapes in the header of one safetensors file."""
    with shard.open("rb") as file:
        header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
    return sum(math.prod(tensor["shape"]) for name, tensor in header.items() if name != "__metadata__")


def bench(model: str, calibration: str, options: argparse.Namespace) -> dict[str, Any]:
    """Convert one model into a temporary folder and return its row of the table."""
    print(f"Converting {model}", file=sys.stderr)
    with tempfile.TemporaryDirectory(prefix="bench-output-") as scratch:
        command = [sys.executable, "-m", "transmla", "convert", model, str(Path(scratch) / "converted")]
        command += ["--calibration", calibration]
        for flag in ("qk_rope_head_dim", "kv_lora_rank", "num_windows", "window"):
            command += [f"--{flag.replace('_', '-')}", str(getattr(options, flag))]
        command += ["--repeats", str(options.repeats)]
        planned = subprocess.run(
            [*command, *options.flags, "--dry-run", "--json", "-q"], check=True, stdout=subprocess.PIPE
        )
        predicted = round(json.loads(planned.stdout)["peak_memory_bytes"] / 1e6)
        before = plain_pass(model, options)
        measured = measure(command + options.flags, threads=options.threads)
        after = plain_pass(model, options)
        plain = {name: round((before[name] + after[name]) / 2, 2) for name in before}
        return {**describe(Path(model)), **measured, "predicted_mb": predicted, **plain}


def smallest_conversion(options: argparse.Namespace) -> dict[str, float]:
    """Measure a conversion of next to nothing: what imports, threads and a first run of everything take."""
    with tempfile.TemporaryDirectory(prefix="bench-smallest-") as scratch:
        folder = Path(scratch) / "source"
        make_in_a_process(folder, num_layers=1, hidden_size=64)
        command = [sys.executable, "-m", "transmla", "convert", str(folder), str(Path(scratch) / "converted")]
        command += ["--calibration", str(folder.with_suffix(".txt")), "--kv-ratio", "0.5"]
        return measure([*command, "--num-windows", "4", "--window", "32"], threads=options.threads)


def make_in_a_process(folder: Path, *, num_layers: int, hidden_size: int) -> None:
    """Make a checkpoint in a process that is gone afterwards, and its memory with it."""
    maker = multiprocessing.get_context("spawn").Process(
        target=make_checkpoint, args=(folder,), kwargs={"num_layers": num_layers, "hidden_size": hidden_size}
    )
    maker.start()
    maker.join()
    if maker.exitcode:
        sys.exit(f"The checkpoint of {num_layers} layers could not be made.")


def bench_depths(options: argparse.Namespace) -> list[dict[str, Any]]:
    """Bench random checkpoints, one at a time."""
    rows = []
    for depth in options.depths:
        with tempfile.TemporaryDirectory(prefix="bench-source-") as scratch:
            folder = Path(scratch) / f"layers-{depth}"
            make_in_a_process(folder, num_layers=depth, hidden_size=options.hidden_size)
            rows.append(bench(str(folder), str(folder.with_suffix(".txt")), options))
    return rows


def print_table(report: dict[str, Any]) -> None:
    """Print the rows for people."""
    print(f"{report['machine']}; {report['threads']} threads; " + ", ".join(map(" ".join, report["versions"].items())))
    print(f"{report['num_windows']} windows of {report['window']} tokens; flags: {' '.join(report['flags']) or 'none'}")
    columns = (
        "layers",
        "parameters",
        "checkpoint_mb",
        "seconds",
        "cpu_seconds",
        "peak_mb",
        "predicted_mb",
        "plain_body",
        "plain",
    )
    print("  ".join(f"{column:>13}" for column in columns))
    for row in ({"layers": "next to none", **report["smallest"]}, *report["rows"]):
        cells = (row.get(column, "-") for column in columns)
        print("  ".join(f"{cell:>13,}" if isinstance(cell, int | float) else f"{cell:>13}" for cell in cells))


def main() -> None:
    """Bench, then print a table or JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--depths", type=int, nargs="+", default=[4, 8, 16, 32], help="layers of the random models")
    parser.add_argument("--hidden-size", type=int, default=512, help="of the random models; a multiple of 256")
    parser.add_argument("--model", help="measure this model instead")
    parser.add_argument("--calibration", help="text for --model")
    parser.add_argument("--qk-rope-head-dim", type=int, default=64)
    parser.add_argument("--kv-lora-rank", type=int, default=128)
    parser.add_argument("--num-windows", type=int, default=32)
    parser.add_argument("--repeats", type=float, default=0.33, help="0 for methods that take none")
    parser.add_argument("--window", type=int, default=256)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    arguments = sys.argv[1:]
    end = arguments.index("--") if "--" in arguments else len(arguments)
    options = parser.parse_args(arguments[:end])
    options.flags = arguments[end + 1 :]
    if bool(options.model) != bool(options.calibration):
        parser.error("--model and --calibration go together.")

    smallest_conversion(options)  # from here on the libraries are in the disk cache
    report = {
        "machine": f"{platform.system()} {platform.machine()}, {os.cpu_count()} cores",
        "versions": {"python": platform.python_version()}
        | {name: version(name) for name in ("transmla", "torch", "transformers")},
        "threads": options.threads,
        "num_windows": options.num_windows,
        "window": options.window,
        "flags": options.flags,
        "smallest": smallest_conversion(options),
        "rows": [bench(options.model, options.calibration, options)] if options.model else bench_depths(options),
    }
    if options.json:
        print(json.dumps(report, indent=2))
    else:
        print_table(report)


if __name__ == "__main__":
    main()
