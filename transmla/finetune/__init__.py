"""Training of a converted model, by default to say what its source says."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from transmla.config import FinetuneRequest

if TYPE_CHECKING:
    from transmla.finetune.report import FinetuneReport
    from transmla.finetune.run import finetune

__all__ = ["FinetuneReport", "FinetuneRequest", "finetune"]


def __getattr__(name: str) -> Any:
    """Import what is asked for, and PyTorch with it, only now."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from transmla.finetune import api

    return getattr(api, name)
