"""Speed and memory of a source and its conversions, measured in turns."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from transmla.config import BenchRequest

if TYPE_CHECKING:
    from transmla.bench.report import BenchReport
    from transmla.bench.run import bench

__all__ = ["BenchReport", "BenchRequest", "bench"]


def __getattr__(name: str) -> Any:
    """Import what is asked for, and PyTorch with it, only now."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from transmla.bench import api

    return getattr(api, name)
