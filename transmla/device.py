"""Where the computation runs, and giving its memory back."""

from __future__ import annotations

import ctypes
import sys

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


def trim_memory() -> None:
    """Return freed memory to the operating system, between two units of long work.

    glibc keeps freed blocks of less than 32 MiB for itself and scatters new ones among them: layer after layer the
    process would grow, although nothing is held.
    """
    if sys.platform == "linux":
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
        if trim is not None:
            trim(0)
