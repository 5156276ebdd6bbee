"""Conversion of a grouped-query attention checkpoint into a native DeepSeek-V3 one."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from transmla.config import ConvertRequest, InspectRequest, SizesRequest

if TYPE_CHECKING:
    from transmla.convert.inspection import Inspection, inspect
    from transmla.convert.report import ConversionReport
    from transmla.convert.run import convert
    from transmla.convert.size_table import SizesReport, compare_sizes

__all__ = [
    "ConversionReport",
    "ConvertRequest",
    "InspectRequest",
    "Inspection",
    "SizesReport",
    "SizesRequest",
    "compare_sizes",
    "convert",
    "inspect",
]


def __getattr__(name: str) -> Any:
    """Import what is asked for, and PyTorch with it, only now."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from transmla.convert import api

    return getattr(api, name)
