"""A training as a picture: perplexity and divergence of what is held out, against tokens seen."""

from __future__ import annotations

from pathlib import Path

from transmla.finetune.report import FinetuneReport


def plot_finetune(report: FinetuneReport, path: Path) -> None:
    """Draw both curves into a file."""
    from matplotlib.figure import Figure

    panels = [("perplexity", "perplexity, held out")]
    if report.teacher is not None:
        panels.append(("kl", "KL to the teacher, nats a token"))
    figure = Figure(figsize=(4.5 * len(panels), 3.5), layout="constrained")
    for axes, (field, label) in zip(figure.subplots(1, len(panels), squeeze=False).flat, panels, strict=True):
        points = [(point.num_tokens_seen / 1e6, getattr(point, field)) for point in report.heldout]
        axes.plot(*zip(*points, strict=True), marker="o", markersize=4)
        axes.set_xlabel("million tokens seen")
        axes.set_ylabel(label)
        axes.grid(alpha=0.3)
    figure.suptitle(f"{Path(report.checkpoint).name}, {report.num_trained_parameters:,} trained parameters", fontsize=9)
    figure.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else None, bbox_inches="tight")
