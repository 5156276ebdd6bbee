"""Pictures, each a piece of SVG that stands in a page."""

from __future__ import annotations

import io
from typing import Any


def new_figure(width: float, height: float) -> Any:
    """Return an empty figure, in inches."""
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


def as_svg(figure: Any) -> str:
    """Return a figure as SVG."""
    import matplotlib

    written = io.StringIO()
    # Text stays text, and the same numbers make the same bytes.
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "transmla"}):
        figure.savefig(written, format="svg", metadata={"Date": None})
    return written.getvalue()[written.getvalue().index("<svg") :]
