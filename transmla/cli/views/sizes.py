"""Cache sizes and their predicted loss at the terminal."""

from __future__ import annotations

from rich import box
from rich.console import Group
from rich.table import Table
from rich.text import Text

from transmla.cli.views.facts import share
from transmla.convert.size_table import SizesReport


def sizes_view(report: SizesReport) -> Group:
    """Lay the sizes out for people, the smallest first, within 80 columns."""
    table = Table(
        title=f"{report.model}: {report.source_kv_bytes_per_token:,} bytes of KV cache per token in "
        f"{report.source_dtype}; predicted on {report.num_windows} windows of {report.window} tokens",
        box=box.SIMPLE_HEAD,
        title_justify="left",
        pad_edge=False,
        padding=(0, 1, 0, 0),
    )
    for heading in (
        *("Share", "Latent\n+ rotary", f"Bytes/token,\n{report.dtype}", "Error", "Excess,\nnats"),
        "Heads: nope/\nrope/value",
    ):
        table.add_column(heading, justify="right", no_wrap=True)
    table.add_column("Engines", overflow="fold")
    for row in report.sizes:
        table.add_row(
            share(row.share),
            f"{row.kv_lora_rank} + {row.qk_rope_head_dim}",
            f"{row.kv_bytes_per_token:,}",
            f"{row.predictions[0].error:.3g}",
            f"{row.predicted_excess:.2g}",
            f"{row.qk_nope_head_dim}/{row.qk_rope_head_dim}/{row.v_head_dim}",
            ", ".join(row.engines) or "none",
        )
    example = report.sizes[len(report.sizes) // 2]
    take = f"To take one: transmla convert MODEL FOLDER {' '.join(example.flags)}"
    # As text: a path may hold what rich would take for markup.
    return Group(table, Text(report.how_far_off), Text(), Text(take))
