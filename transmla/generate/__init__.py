"""One prompt, answered or continued."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from transmla.config import GenerateRequest

if TYPE_CHECKING:
    from transmla.generate.report import GenerationReport
    from transmla.generate.run import generate

__all__ = ["GenerateRequest", "GenerationReport", "generate"]


def __getattr__(name: str) -> Any:
    """Import what is asked for, and PyTorch with it, only now."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from transmla.generate import api

    return getattr(api, name)
