"""Where the computation runs."""

from __future__ import annotations

import torch

from transmla.errors import UsageError


def choose_device(name: str) -> torch.device:
    """Return the named device, or for ``auto`` the fastest one that is there.

    Raises:
        UsageError: no such device, or this PyTorch cannot reach it.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    # PyTorch asserts, rather than raises, when it was built without the device's backend.
    except (RuntimeError, AssertionError, NotImplementedError):
        raise UsageError(
            f"The device {name!r} cannot be used here: pass --device auto, cpu, cuda, cuda:N or mps."
        ) from None
    return device
