"""The safetensors layout: eight bytes of length, a JSON header, then the tensors back to back.

Everything that reads or writes a shard goes through these few functions, so the header of a file is known, and known to
agree with the size of the file, before one weight is touched.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from transmla.errors import CheckpointError

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"

DTYPES: Mapping[str, torch.dtype] = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "I16": torch.int16,
    "I32": torch.int32,
    "I64": torch.int64,
    "U16": torch.uint16,
    "U32": torch.uint32,
    "U64": torch.uint64,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E4M3FNUZ": torch.float8_e4m3fnuz,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E5M2FNUZ": torch.float8_e5m2fnuz,
    "F8_E8M0": torch.float8_e8m0fnu,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F32": torch.float32,
    "F64": torch.float64,
    "C64": torch.complex64,
}
# Types of which several numbers share a byte: known, so that files that hold them are read past, and never read.
_BITS_OF_PACKED = {"F4": 4, "F6_E2M3": 6, "F6_E3M2": 6}
#: Types in which a weight stands for itself, with no scale beside it.
FLOATS = ("F16", "BF16", "F32", "F64")
_SPELLINGS = {dtype: spelling for spelling, dtype in DTYPES.items()}
_LENGTH_BYTES = 8
# What git leaves in the place of a large file that it has not fetched.
_POINTER = b"version https://git-lfs.github.com/spec/"
IS_POINTER = "is not the file itself but a pointer of git-lfs to it: run git lfs pull, or download the model again"
_MAX_HEADER_BYTES = 100_000_000  # the limit of the safetensors library


@dataclass(frozen=True)
class TensorHeader:
    """Where one stored tensor lies and what it is.

    Attributes:
        stored_as: safetensors' name of its type, one that is known.
        offset: of its first byte from the start of the file.
    """

    name: str
    shape: tuple[int, ...]
    stored_as: str
    file: str
    offset: int

    def __post_init__(self) -> None:
        """Refuse a type whose size nobody knows, with the sentence that all who read it would need."""
        if self.stored_as not in DTYPES and self.stored_as not in _BITS_OF_PACKED:
            raise self._unreadable()

    @property
    def dtype(self) -> torch.dtype:
        """Return the torch type.

        Raises:
            CheckpointError: torch has none.
        """
        if self.stored_as not in DTYPES:
            raise self._unreadable()
        return DTYPES[self.stored_as]

    @property
    def nbytes(self) -> int:
        """Return the size of the stored tensor."""
        bits = _BITS_OF_PACKED.get(self.stored_as) or 8 * DTYPES[self.stored_as].itemsize
        return math.prod(self.shape) * bits // 8

    def _unreadable(self) -> CheckpointError:
        return CheckpointError(
            f"Tensor {self.name} in {self.file} is stored as {self.stored_as}, and {', '.join(FLOATS)} can be read: "
            "convert the full-precision checkpoint of this model."
        )


def read_headers(path: Path) -> dict[str, TensorHeader]:
    """Read the header of one shard and check it against the size of the file.

    Raises:
        CheckpointError: unreadable, not safetensors, truncated, or with tensors that overlap or leave gaps.
    """
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            start = file.read(len(_POINTER))
            if start == _POINTER:
                raise CheckpointError(f"{path.name} {IS_POINTER}.")
            file.seek(0)
            length = int.from_bytes(file.read(_LENGTH_BYTES), "little")
            if size < _LENGTH_BYTES or length > min(size - _LENGTH_BYTES, _MAX_HEADER_BYTES):
                raise CheckpointError(
                    f"Shard {path.name} is not a safetensors file, or is truncated inside its header."
                )
            raw = file.read(length)
    except OSError as error:
        raise CheckpointError(f"Shard {path.name} cannot be read: {error.strerror}.") from None
    try:
        entries = json.loads(raw)
        entries.pop("__metadata__", None)
        tensors = [_parse_entry(name, entry, path.name, _LENGTH_BYTES + length) for name, entry in entries.items()]
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        raise CheckpointError(f"Shard {path.name} has a header that is not valid safetensors JSON.") from None
    end = _LENGTH_BYTES + length
    for tensor in sorted(tensors, key=lambda tensor: (tensor.offset, tensor.nbytes)):
        if tensor.offset != end:
            raise CheckpointError(f"Shard {path.name} has a header in which tensors overlap or leave gaps.")
        end += tensor.nbytes
    if end > size:
        raise CheckpointError(
            f"Shard {path.name} is truncated: {size} bytes, its header needs {end}. Download it again."
        )
    if end < size:
        raise CheckpointError(f"Shard {path.name} has {size} bytes, but its header accounts for only {end}.")
    return {tensor.name: tensor for tensor in tensors}


def _parse_entry(name: str, entry: dict[str, Any], file: str, data_start: int) -> TensorHeader:
    begin, end = entry["data_offsets"]
    shape = tuple(entry["shape"])
    if not all(type(number) is int and number >= 0 for number in (begin, end, *shape)):
        raise ValueError("a size or an offset is not a natural number")
    if not isinstance(entry["dtype"], str):
        raise TypeError("a type must be a name")
    header = TensorHeader(name, shape, entry["dtype"], file, data_start + begin)
    if end - begin != header.nbytes:
        raise ValueError("the offsets do not span the shape")
    return header


def encode_header(tensors: Iterable[tuple[str, tuple[int, ...], torch.dtype]]) -> bytes:
    """Write the length and the JSON header of tensors that lie back to back in this order.

    The header is padded with spaces to a multiple of eight bytes, so that the first tensor is aligned.
    """
    entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    begin = 0
    for name, shape, dtype in tensors:
        end = begin + math.prod(shape) * dtype.itemsize
        entries[name] = {"dtype": _SPELLINGS[dtype], "shape": list(shape), "data_offsets": [begin, end]}
        begin = end
    header = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
    header += b" " * (-len(header) % 8)
    return len(header).to_bytes(_LENGTH_BYTES, "little") + header


def check_finite(name: str, tensor: Tensor) -> None:
    """Refuse a tensor with a NaN or an infinity, which would spoil every result computed from it.

    The extremes tell: ``aminmax`` carries a NaN through, in one pass without a temporary as large as the tensor.

    Raises:
        CheckpointError: some value is not finite.
    """
    if not tensor.is_floating_point() or tensor.numel() == 0:
        return
    low, high = torch.aminmax(tensor if tensor.dtype.itemsize > 1 else tensor.float())
    if not (low.isfinite() and high.isfinite()):
        raise CheckpointError(f"Tensor {name} holds values that are NaN or infinite; finite weights are needed.")
