"""How good converted models are, compared with their source."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from transmla.config import EvalRequest

if TYPE_CHECKING:
    from transmla.evaluate.report.report import EvalReport
    from transmla.evaluate.run import evaluate

__all__ = ["EvalReport", "EvalRequest", "evaluate"]


def __getattr__(name: str) -> Any:
    """Import what is asked for, and PyTorch with it, only now."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from transmla.evaluate import api

    return getattr(api, name)
