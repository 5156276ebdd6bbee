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
    check_plots("--plot")
    from matplotlib.backend_bases import FigureCanvasBase

    if path.suffix[1:] not in FigureCanvasBase.filetypes:
        raise UsageError(f"--plot {path} has no ending of a picture: write .png, .svg or .pdf.")
    check_writable(path, "--plot")


def check_plots(flag: str) -> None:
    """Refuse a flag that needs plots where they cannot be drawn.

    Raises:
        UsageError: matplotlib is missing.
    """
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        raise UsageError(f"{flag} needs matplotlib: pip install 'transmla[plots]', or drop {flag}.") from None


def check_writable(path: Path, flag: str) -> None:
    """Refuse a file that has no folder to be written to.

    Raises:
        OutputError: there is none.
    """
    if not path.absolute().parent.is_dir():
        raise OutputError(f"There is no folder {path.absolute().parent} to write {flag} {path.name} to: create it.")
