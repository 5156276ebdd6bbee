"""How much memory a piece of work needs, how much there is, and what it looks like when that is too little.

On CUDA the allocator keeps its own record. Elsewhere the tensors that operations put out are followed until they are
freed: this is exact and repeatable, where the growth of the process would depend on what the C library gives back, but
it leaves out what a kernel takes for itself while it runs. It slows the work down, so work is not timed meanwhile.
"""

from __future__ import annotations

import gc
import sys
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import psutil
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


@runtime_checkable
class Meter(Protocol):
    """Whoever can tell the peak."""

    def lap(self) -> int:
        """Return the most bytes that were in use since the last lap, beyond what was there when the meter started."""
        ...


@contextmanager
def measure_memory(device: torch.device) -> Iterator[Meter]:
    """Measure the memory of the work inside, without the tensors that were there before."""
    if device.type == "cuda":
        yield _AllocatorRecord(device)
    else:
        with LiveTensors() as meter:
            yield meter


class _AllocatorRecord:
    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)

    def lap(self) -> int:
        peak = torch.cuda.max_memory_allocated(self.device) - self.before
        torch.cuda.reset_peak_memory_stats(self.device)
        return peak


class LiveTensors(TorchDispatchMode):
    """Follow the memory that operations put out, from the operation that makes it to the last tensor that uses it."""

    def __init__(self) -> None:
        super().__init__()
        self._known: set[int] = set()
        self._live = self._peak = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run the operation and note what is new in its output."""
        kwargs = kwargs or {}
        # In inference mode some operations arrive whole, with all that they allocate on the way inside.
        with self:
            output = func.decompose(*args, **kwargs)
        if output is not NotImplemented:
            return output
        output = func(*args, **kwargs)
        given = {_address(value) for value in tree_leaves((args, kwargs)) if isinstance(value, Tensor)}
        for value in tree_leaves(output):
            # A view, or the result of an operation in place, is no new memory.
            if isinstance(value, Tensor) and _address(value) not in self._known | given:
                self._follow(value.untyped_storage())
        return output

    def lap(self) -> int:
        """Return the most bytes at once since the last lap."""
        peak, self._peak = self._peak, self._live
        return peak

    def _follow(self, storage: torch.UntypedStorage) -> None:
        address, size = storage.data_ptr(), storage.nbytes()
        if not size:
            return
        self._known.add(address)
        self._live += size
        self._peak = max(self._peak, self._live)
        weakref.finalize(storage, self._forget, address, size)

    def _forget(self, address: int, size: int) -> None:
        self._known.discard(address)
        self._live -= size


def _address(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def is_out_of_memory(error: RuntimeError) -> bool:
    """Return whether an error of PyTorch's means that memory was too little, on whichever device."""
    return isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error)


def release_memory(device: torch.device) -> None:
    """Give back what a failed attempt has left behind."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def free_memory() -> int:
    """Return the bytes of the machine's memory that are to be had without swapping."""
    return psutil.virtual_memory().available


@contextmanager
def memory_limit(device: torch.device) -> Iterator[None]:
    """Have allocations beyond the memory that is free fail, where the system would promise it and kill us later.

    On a GPU they fail by themselves; elsewhere than on Linux nothing is done.
    """
    if device.type != "cpu" or sys.platform != "linux":
        yield
        return
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_DATA)
    limit = _private_memory() + free_memory()
    resource.setrlimit(resource.RLIMIT_DATA, (limit if hard < 0 else min(limit, hard), hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_DATA, (soft, hard))


def _private_memory() -> int:
    """Return what this process has been promised so far, as the limit counts it."""
    for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
        if line.startswith("VmData:"):
            return 1024 * int(line.split()[1])
    raise AssertionError("no VmData")
