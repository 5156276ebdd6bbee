"""Plot excess NLL against cache size from the reports of ``scripts/experiments/methods.sh``, one folder a size.

    python scripts/experiments/plot_sizes.py compare-output/*/report-wiki.json --output docs/images/excess.svg

Needs matplotlib: pip install '.[plots]'.
"""

from __future__ import annotations

import argparse
import re
import sys
from pathlib import Path

from transmla.evaluate.report.report import EvalReport

METHODS = {"rorope": "rorope at its best FreqFold", "ours": "fitted", "ours-healed": "healed"}


def main() -> None:
    """Read the reports, draw a line a method."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("reports", type=Path, nargs="+")
    parser.add_argument("--output", type=Path, required=True)
    options = parser.parse_args()
    try:
        from matplotlib.figure import Figure
    except ImportError:
        sys.exit("matplotlib is missing: pip install '.[plots]'.")

    points: dict[str, list[tuple[float, float, str]]] = {name: [] for name in METHODS}
    for path in options.reports:
        report = EvalReport.model_validate_json(path.read_text(encoding="utf-8"))
        best: dict[str, tuple[float, float, str]] = {}
        source, *converted = report.models
        for model, score in zip(converted, report.texts[0].scores[1:], strict=True):
            name = re.sub(r"-fold-\d+$", "", Path(model.name).name)
            share = model.kv_bytes_per_token / source.kv_bytes_per_token
            excess = score.excess_nll or 0.0
            if name in METHODS and (name not in best or excess < best[name][1]):
                best[name] = (share, excess, path.parent.name)
        for name, point in best.items():
            points[name].append(point)

    figure = Figure(figsize=(7, 4.2), layout="constrained")
    axes = figure.subplots()
    for name, label in METHODS.items():
        if line := sorted(points[name]):
            shares, excesses, _ = zip(*line, strict=True)
            axes.plot(shares, excesses, marker="o", label=label)
    for share, excess, size in points["ours"]:
        axes.annotate(size.replace("-", " + "), (share, excess), textcoords="offset points", xytext=(4, 6), fontsize=8)
    axes.margins(x=0.12)
    axes.set_xlabel("KV cache, share of the source's (rotary + latent numbers)")
    axes.set_ylabel("excess NLL over the source, nats per token")
    axes.set_yscale("log")
    axes.xaxis.set_major_formatter("{x:.0%}")
    axes.grid(alpha=0.3)
    axes.legend()
    options.output.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(options.output, metadata={"Date": None} if options.output.suffix == ".svg" else None)
    print(options.output)


if __name__ == "__main__":
    main()
