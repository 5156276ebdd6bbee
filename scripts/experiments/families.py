"""Convert small trained models of several families to half of their cache, and measure what each way loses.

A model of each family is trained on one part of C4 (``train_small.py``, some minutes), fitted on another, and judged
on a third. The published method is tried at every FreqFold; ours in closed form and healed. Where there are biases
they are folded into the weights, too; where there is a norm on queries and keys, the crude way is tried, too: one
factor for each of their numbers.

    python scripts/experiments/families.py OUTPUT_DIR [--families qwen2 qwen3 mixtral]
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path
from typing import Any

from rich.console import Console
from train_small import FAMILIES

from transmla.cli.progress import Bars
from transmla.cli.views.evaluation import report_tables
from transmla.config import ConvertRequest, EvalRequest
from transmla.convert.run import convert
from transmla.evaluate.run import evaluate

SCRIPTS = Path(__file__).parents[1]
SIZES = {"qk_rope_head_dim": 16, "kv_lora_rank": 48}
WAYS: dict[str, dict[str, Any]] = {
    **{f"rorope-{fold}": {"method": "rorope", "freq_fold": fold} for fold in (2, 4, 8, 16)},
    "closed-form": {},
    "healed": {"num_windows": 256, "heal_steps": 140},
}
MORE: dict[str, dict[str, dict[str, Any]]] = {
    "qwen2": {
        "folded": {"biases": "merge"},
        "folded-healed": {"biases": "merge", "num_windows": 256, "heal_steps": 140},
    },
    "qwen3": {"one-factor": {"method_options": {"linear_ridge": 1e12}}},
}


def main() -> None:
    """Train, convert, measure, print a table for each family."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output_dir", type=Path)
    parser.add_argument("--families", nargs="+", choices=list(FAMILIES), default=["qwen2", "qwen3", "mixtral"])
    options = parser.parse_args()
    fetch = [sys.executable, str(SCRIPTS / "fetch_assets.py")]
    assets = Path(subprocess.run(fetch, check=True, stdout=subprocess.PIPE, text=True).stdout.strip())
    for family in options.families:
        source = options.output_dir / family / "source"
        if not source.exists():
            source.parent.mkdir(parents=True, exist_ok=True)
            train = [
                sys.executable,
                str(SCRIPTS / "experiments" / "train_small.py"),
                str(assets / "c4-fit.txt"),
                str(source),
            ]
            subprocess.run([*train, "--family", family], check=True)
        converted = []
        for name, choices in (WAYS | MORE.get(family, {})).items():
            converted.append(str(source.with_name(name)))
            request = ConvertRequest(
                model=str(source),
                output_dir=source.with_name(name),
                calibration=(str(assets / "c4-tune.txt"),),
                **SIZES,
                **choices,
            )
            convert(request, progress=Bars(), overwrite=True)
        report = evaluate(
            EvalRequest(
                source=str(source),
                converted=tuple(converted),
                dataset=str(assets / "c4-test.txt"),
                window=256,
                max_tokens=65536,
            )
        )
        source.with_name("report.json").write_text(report.model_dump_json(indent=2) + "\n", encoding="utf-8")
        Console().print(*report_tables(report), sep="\n")


if __name__ == "__main__":
    main()
