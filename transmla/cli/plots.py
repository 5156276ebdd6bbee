"""Plots that a command is asked for."""

from __future__ import annotations

from pathlib import Path

from transmla.errors import OutputError, UsageError


def check_plot(path: Path) -> None:
    """Refuse, before anything is measured, a plot that could not be written.

    Raises:
        UsageError: matplotlib is missing, or does not write such files.
        OutputError: there is no folder to write it to.
    """
    try:
        from matplotlib.backend_bases import FigureCanvasBase
    except ImportError:
        raise UsageError("--plot needs matplotlib: pip install 'transmla[plots]', or drop --plot.") from None
    if path.suffix[1:] not in FigureCanvasBase.filetypes:
        raise UsageError(f"--plot {path} has no ending of a picture: write .png, .svg or .pdf.")
    if not path.absolute().parent.is_dir():
        raise OutputError(f"There is no folder {path.absolute().parent} to write --plot {path.name} to: create it.")
