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
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F32": torch.float32,
    "F64": torch.float64,
}
_SPELLINGS = {dtype: spelling for spelling, dtype in DTYPES.items()}
_LENGTH_BYTES = 8
_MAX_HEADER_BYTES = 100_000_000  # the limit of the safetensors library


@dataclass(frozen=True)
class TensorHeader:
    """Where one stored tensor lies and what it is; ``offset`` counts bytes from the start of the file."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    file: str
    offset: int

    @property
    def nbytes(self) -> int:
        """Return the size of the stored tensor."""
        return math.prod(self.shape) * self.dtype.itemsize


def parse_dtype(spelling: str, *, tensor: str, file: str) -> torch.dtype:
    """Return the torch type of a safetensors type name.

    Raises:
        CheckpointError: a type that torch cannot hold as it is.
    """
    if spelling not in DTYPES:
        raise CheckpointError(
            f"Tensor {tensor} in {file} is stored as {spelling}; one of {', '.join(DTYPES)} is needed. "
            "Convert from the unquantised checkpoint of this model."
        )
    return DTYPES[spelling]


def read_headers(path: Path) -> dict[str, TensorHeader]:
    """Read the header of one shard and check it against the size of the file.

    Raises:
        CheckpointError: unreadable, not safetensors, truncated, or with tensors that overlap or leave gaps.
    """
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
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
    header = TensorHeader(name, shape, parse_dtype(entry["dtype"], tensor=name, file=file), file, data_start + begin)
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
