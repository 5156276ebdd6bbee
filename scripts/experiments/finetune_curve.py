"""Perplexity on test text while a conversion of SmolLM2 is trained, against tokens seen; it decides nothing.

Whatever is measured goes into OUTPUT_DIR.jsonl, so that a run may be interrupted and go on with --resume. With several
of these files the second form draws them in one picture; one of a single point becomes a line to compare with.

Usage: python scripts/experiments/finetune_curve.py train CHECKPOINT OUTPUT_DIR [--resume] [NAME=VALUE …]
       python scripts/experiments/finetune_curve.py plot PICTURE CURVE.jsonl …

NAME=VALUE are fields of the request, such as max_steps=300 learning_rate=3e-4 bf16=true.
"""

from __future__ import annotations

import argparse
import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
import yaml
from rich.console import Console
from transformers import TrainerCallback

from transmla.checkpoint.source import open_source
from transmla.cli.progress import Bars
from transmla.cli.views.evaluation import report_tables
from transmla.config import EvalRequest, FinetuneRequest
from transmla.data.documents import open_documents
from transmla.data.text import consecutive_windows, load_tokenizer
from transmla.evaluate.run import evaluate
from transmla.finetune.run import finetune

ROOT = Path(__file__).resolve().parents[2]
GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
CORPORA = ("wiki", "c4")
WINDOW, TOKENS = 1024, 16384


class Curve(TrainerCallback):
    """Measures test text whenever held-out text is measured."""

    def __init__(self, path: Path, windows: dict[str, torch.Tensor]) -> None:
        self.path, self.windows = path, windows

    def on_evaluate(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        model.eval()
        found = {corpus: perplexity(model, windows) for corpus, windows in self.windows.items()}
        write(self.path, {"step": state.global_step, "tokens": state.num_input_tokens_seen, **found})
        print(f"  test: {found}", file=sys.stderr)


@torch.no_grad()
def perplexity(model: Any, windows: torch.Tensor) -> float:
    """Return it by the student's own loss, which it computes for a few positions at a time."""
    losses = []
    for window in windows.to(model.device).split(1):
        positions = torch.arange(window.shape[1], device=window.device)[None]
        losses.append(model(input_ids=window, position_ids=positions, labels=window)["nll"].item())
    return math.exp(sum(losses) / len(losses))


def write(path: Path, entry: dict[str, Any]) -> None:
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(entry) + "\n")


def train(checkpoint: str, output: Path, choices: list[str], *, resume: bool) -> None:
    fetched = subprocess.run(
        [sys.executable, ROOT / "scripts" / "fetch_assets.py"], check=True, stdout=subprocess.PIPE, text=True
    )
    assets = Path(fetched.stdout.strip())
    source = open_source(str(assets / "smollm2"), gguf_file=GGUF)
    tokenizer = load_tokenizer(source)
    windows = {
        corpus: consecutive_windows(
            open_documents(str(assets / f"{corpus}-test.txt")), tokenizer, window=WINDOW, max_tokens=TOKENS
        )
        for corpus in CORPORA
    }
    path = output.with_name(output.name + ".jsonl")
    if not resume:
        path.unlink(missing_ok=True)
        path.parent.mkdir(parents=True, exist_ok=True)
    flags = {
        "checkpoint": checkpoint,
        "output_dir": output,
        "dataset": [str(assets / f"{corpus}-tune.txt") for corpus in CORPORA],
        "teacher": str(assets / "smollm2"),
        "gguf_file": GGUF,
        "num_eval_windows": 16,
        **{name: yaml.safe_load(value) for name, value in (choice.split("=", 1) for choice in choices)},
    }
    request = FinetuneRequest.build(recipe=None, flags=flags)
    finetune(
        request,
        progress=Bars(),
        tell=lambda line: print(line, file=sys.stderr),
        callbacks=[Curve(path, windows)],
        resume=resume,
        overwrite=True,
    )
    # In float32, of what was published, beside the source.
    texts = [str(assets / f"{corpus}-test.txt") for corpus in CORPORA]
    judged = EvalRequest(
        source=str(source.folder), converted=(checkpoint, str(output)), dataset=texts, window=WINDOW, max_tokens=TOKENS
    )
    Console().print(*report_tables(evaluate(judged)), sep="\n")


def plot(picture: Path, curves: list[Path]) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.5), layout="constrained")
    for axes, corpus in zip(figure.subplots(1, len(CORPORA)), CORPORA, strict=True):
        for path in curves:
            # A resumed run measures some steps twice: the last time counts.
            points = {entry["step"]: entry for entry in map(json.loads, path.read_text(encoding="utf-8").splitlines())}
            tokens, values = zip(*((p["tokens"] / 1e6, p[corpus]) for _, p in sorted(points.items())), strict=True)
            if len(points) == 1:
                # What is not trained.
                axes.axhline(values[0], color="grey", linestyle="--", label=path.stem)
            else:
                axes.plot(tokens, values, marker="o", markersize=3, label=path.stem)
        axes.set_xlabel("million tokens seen")
        axes.set_ylabel(f"perplexity, {corpus} test")
        axes.grid(alpha=0.3)
    figure.axes[0].legend(fontsize=8)
    figure.savefig(picture, metadata={"Date": None} if picture.suffix == ".svg" else None)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    training = commands.add_parser("train")
    training.add_argument("checkpoint")
    training.add_argument("output_dir", type=Path)
    training.add_argument("choices", nargs="*")
    training.add_argument("--resume", action="store_true")
    drawing = commands.add_parser("plot")
    drawing.add_argument("picture", type=Path)
    drawing.add_argument("curves", type=Path, nargs="+")
    options = parser.parse_args()
    if options.command == "plot":
        plot(options.picture, options.curves)
    else:
        train(options.checkpoint, options.output_dir, options.choices, resume=options.resume)


if __name__ == "__main__":
    main()
