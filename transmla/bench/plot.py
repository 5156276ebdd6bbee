"""A benchmark as a picture: speed and memory against context length, a line for each model in each of its forms."""

from __future__ import annotations

from itertools import cycle
from pathlib import Path

from transmla.bench.report import BenchReport

_PANELS = (
    ("decode_tokens_per_second", "decoding, tokens/s", 1.0),
    ("seconds_to_first_token", "time to first token, s", 1.0),
    ("cache_bytes", "KV cache, MB", 1e-6),
    ("peak_bytes_decode", "peak memory of decoding, MB", 1e-6),
)
_LINE_STYLES = ("-", "--", ":", "-.")


def plot_bench(report: BenchReport, path: Path) -> None:
    """Draw the four panels into a file."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9.5, 7), layout="constrained")
    contexts, batch_sizes = (sorted({getattr(cell, key) for cell in report.cells}) for key in ("context", "batch_size"))
    for axes, (field, label, unit) in zip(figure.subplots(2, 2).flat, _PANELS, strict=True):
        for color, model in enumerate(report.models):
            for batch_size, style in zip(batch_sizes, cycle(_LINE_STYLES), strict=False):
                points = [
                    (cell.context, getattr(cell, field) * unit)
                    for cell in report.cells
                    if (cell.model, cell.form, cell.batch_size) == (model.name, model.form, batch_size)
                    and cell.problem is None
                ]
                name = f"{Path(model.name).name}, {model.form}"
                name += f", batch {batch_size}" if len(batch_sizes) > 1 else ""
                line = zip(*points, strict=True) if points else ([], [])
                axes.plot(*line, color=f"C{color}", linestyle=style, marker="o", markersize=4, label=name)
        axes.set_xscale("log", base=2)
        axes.set_xticks(contexts, labels=[f"{context:,}" for context in contexts])
        axes.set_xlabel("context, tokens")
        axes.set_ylabel(label)
        axes.set_ylim(bottom=0)
        axes.grid(alpha=0.3)
    handles, labels = figure.axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=len(report.models), fontsize=8)
    figure.suptitle(f"{report.machine}, {report.dtype}", fontsize=9, y=-0.02)
    figure.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else None, bbox_inches="tight")
