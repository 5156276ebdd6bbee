"""Whether a checkpoint is whole, and computes what its source computes."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from transmla.config import VerifyRequest

if TYPE_CHECKING:
    from transmla.verify.report import Verification
    from transmla.verify.run import verify

__all__ = ["Verification", "VerifyRequest", "verify"]


def __getattr__(name: str) -> Any:
    """Import what is asked for, and PyTorch with it, only now."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from transmla.verify import api

    return getattr(api, name)
