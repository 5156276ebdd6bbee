"""Say what each stage of the conversion is worth: convert with one stage after another, and measure every result.

The stages have no flags, for nobody wants a conversion without them; they are options of the method. SmolLM2, 128 x 256
tokens of Wikipedia to fit on, other articles to judge by.

    python scripts/experiments/ablation.py OUTPUT_DIR [--qk-rope-head-dim 32] [--kv-lora-rank 96] [--heal-steps 140]
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path
from typing import Any

from rich.console import Console

from transmla.cli.progress import Bars
from transmla.cli.views.evaluation import report_tables
from transmla.config import ConvertRequest, EvalRequest
from transmla.convert.run import convert
from transmla.evaluate.run import evaluate

GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"


_NO_FEEDBACK = {"error_feedback": False}
STAGES: dict[str, dict[str, Any]] = {
    "rorope": {"method": "rorope", "freq_fold": 4},
    "eigenvectors": {"method_options": {"refine_steps": 0, **_NO_FEEDBACK}},
    "search": {"method_options": _NO_FEEDBACK},
    "feedback": {"method_options": {"refit": False}},
    "refit": {},
}


def main() -> None:
    """Convert, measure, print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output_dir", type=Path)
    parser.add_argument("--qk-rope-head-dim", type=int, default=32)
    parser.add_argument("--kv-lora-rank", type=int, default=96)
    parser.add_argument("--heal-steps", type=int, default=0, help="add a stage: healed on the same windows")
    options = parser.parse_args()
    fetched = subprocess.run(
        [sys.executable, str(Path(__file__).parents[1] / "fetch_assets.py")],
        check=True,
        stdout=subprocess.PIPE,
        text=True,
    )
    assets = Path(fetched.stdout.strip())
    stages = dict(STAGES)
    if options.heal_steps:
        stages["healing"] = {"heal_steps": options.heal_steps}
    source = {"gguf_file": GGUF}
    for name, choices in stages.items():
        request = ConvertRequest(
            model=str(assets / "smollm2"),
            output_dir=options.output_dir / name,
            calibration=(str(assets / "wiki-fit.txt"),),
            qk_rope_head_dim=options.qk_rope_head_dim,
            kv_lora_rank=options.kv_lora_rank,
            **source,
            **choices,
        )
        convert(request, progress=Bars(), overwrite=True)
    report = evaluate(
        EvalRequest(
            source=str(assets / "smollm2"),
            converted=tuple(str(options.output_dir / name) for name in stages),
            dataset=str(assets / "wiki-test.txt"),
            max_tokens=16384,
            **source,
        )
    )
    (options.output_dir / "report.json").write_text(report.model_dump_json(indent=2) + "\n", encoding="utf-8")
    Console().print(*report_tables(report), sep="\n")


if __name__ == "__main__":
    main()
