"""Where the computation runs, and giving its memory back."""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Callable

import torch

from transmla.errors import UsageError

# Bytes of a block that is given back as soon as it is freed.
_LARGE = 2**25


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
        raise UsageError(f"The device {name!r} cannot be used here: pass --device {', '.join(_here())}.") from None
    return device


def _here() -> list[str]:
    """Return what can be used here."""
    gpus = [f"cuda:{index}" for index in range(torch.cuda.device_count())]
    return ["auto", "cpu", *gpus, *(["mps"] if torch.backends.mps.is_available() else [])]


def reuse_memory() -> None:
    """Have this process keep what it frees for its next tensors, until :func:`trim_memory`.

    glibc maps every large block anew and gives it back when it is freed; the system then clears it page by page for
    each activation, which takes a twentieth of a conversion's time on a CPU. The largest blocks are still given back:
    clearing them takes little beside what is computed in them, and what lies between them would be held for nothing.
    """
    set_option = _from_libc("mallopt")
    if set_option is not None:
        # M_TRIM_THRESHOLD and M_MMAP_THRESHOLD of malloc.h.
        set_option(-1, 2**31 - 1)
        set_option(-3, _LARGE)


def trim_memory() -> None:
    """Return freed memory to the operating system, between two units of long work.

    glibc keeps freed blocks for itself and scatters new ones among them: layer after layer the process would grow,
    although nothing is held.
    """
    trim = _from_libc("malloc_trim")
    if trim is not None:
        trim(0)


def _from_libc(name: str) -> Callable[..., int] | None:
    """Return a function of glibc, where there is one."""
    return getattr(ctypes.CDLL(None), name, None) if sys.platform == "linux" else None
