"""A table of sizes as a plot: predicted excess against cache size, the best split of each size on a line."""

from pathlib import Path

from transmla.convert.excess import predicted_excess
from transmla.convert.size_table import SizesReport


def plot_sizes(report: SizesReport, path: Path) -> None:
    """Draw the plot into a file."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.5, 4), layout="constrained")
    axes = figure.subplots()
    others = [(row.share, predicted_excess(one.error)) for row in report.sizes for one in row.predictions[1:]]
    if others:
        axes.plot(*zip(*others, strict=True), "o", color="C7", markersize=3, label="other splits")
    best = [(row.share, row.predicted_excess) for row in report.sizes]
    axes.plot(*zip(*best, strict=True), "o-", color="C0", markersize=4, label="best split")
    for row in report.sizes:
        axes.annotate(
            f"{row.kv_lora_rank} + {row.qk_rope_head_dim}",
            (row.share, row.predicted_excess),
            textcoords="offset points",
            xytext=(4, 6),
            fontsize=7,
        )
    axes.xaxis.set_major_formatter(lambda share, _: f"{share:.0%}")
    axes.set_xlabel("KV cache, share of the source's")
    axes.set_ylabel("predicted excess, nats a token")
    axes.set_xlim(left=0)
    axes.set_ylim(bottom=0)
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    figure.suptitle(
        f"{Path(report.model).name}: latent + rotary, predicted on {report.num_windows} windows", fontsize=9
    )
    figure.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else None)
