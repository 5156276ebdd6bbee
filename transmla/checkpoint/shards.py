"""Which tensor goes into which shard, and where, before any of them is computed."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch

from transmla.checkpoint.safetensors import SINGLE_FILE, encode_header
from transmla.errors import UsageError

_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*(?:([kmgt])(i?))?b?", re.IGNORECASE)


@dataclass(frozen=True)
class TensorPlan:
    """A tensor that will be written."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def nbytes(self) -> int:
        """Return its size in the file."""
        return math.prod(self.shape) * self.dtype.itemsize


@dataclass(frozen=True)
class ShardPlan:
    """One weight file, byte for byte except for the weights.

    Attributes:
        tensors: In file order.
        offsets: First byte of each tensor, from the start of the file.
        header: The bytes before the first tensor.
        nbytes: Size of the whole file.
    """

    file_name: str
    tensors: tuple[TensorPlan, ...]
    offsets: tuple[int, ...]
    header: bytes
    nbytes: int


def plan_shards(tensors: Sequence[TensorPlan], *, max_shard_size: str | int) -> tuple[ShardPlan, ...]:
    """Divide tensors, in their order, into weight files of at most ``max_shard_size`` bytes of weights each.

    A tensor larger than the limit gets a file of its own. Within a file wider types come first, so that every tensor
    is aligned to its type, as views into a mapped file need.

    Raises:
        UsageError: a size that cannot be read.
    """
    assert len({tensor.name for tensor in tensors}) == len(tensors), "a tensor is planned twice"
    limit = parse_size(max_shard_size)
    groups: list[list[TensorPlan]] = [[]]
    room = limit
    for tensor in tensors:
        if groups[-1] and tensor.nbytes > room:
            groups.append([])
            room = limit
        groups[-1].append(tensor)
        room -= tensor.nbytes
    count = len(groups)
    names = (
        [f"model-{number:05d}-of-{count:05d}.safetensors" for number in range(1, count + 1)]
        if count > 1
        else [SINGLE_FILE]
    )
    return tuple(_lay_out(name, group) for name, group in zip(names, groups, strict=True))


def _lay_out(file_name: str, tensors: Iterable[TensorPlan]) -> ShardPlan:
    tensors = tuple(sorted(tensors, key=lambda tensor: -tensor.dtype.itemsize))
    header = encode_header((tensor.name, tensor.shape, tensor.dtype) for tensor in tensors)
    offsets = []
    end = len(header)
    for tensor in tensors:
        offsets.append(end)
        end += tensor.nbytes
    return ShardPlan(file_name, tensors, tuple(offsets), header, end)


def parse_size(size: str | int) -> int:
    """Read a number of bytes: ``5GB`` (decimal), ``2GiB`` (binary), ``500MB``, or plain bytes.

    Raises:
        UsageError: not a positive size.
    """
    match = _SIZE.fullmatch(str(size).strip())
    if match:
        number, unit, binary = match.groups()
        power = " kmgt".index(unit.lower()) if unit else 0
        count = int(float(number) * (1024 if binary else 1000) ** power)
        if count > 0:
            return count
    raise UsageError(f"--max-shard-size {size!r} is not a size; write 5GB, 500MB, 2GiB or a number of bytes.")
