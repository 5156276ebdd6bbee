"""Reading tensors of a sharded checkpoint by name, a few at a time."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType

import torch
from torch import Tensor

from transmla.checkpoint.contents import no_weights
from transmla.checkpoint.safe_paths import find_file, read_json
from transmla.checkpoint.safetensors import INDEX_FILE, SINGLE_FILE, TensorHeader, check_finite, read_headers
from transmla.errors import CheckpointError


def check_headers(headers: Mapping[str, TensorHeader], expected: Mapping[str, torch.Size]) -> None:
    """Make sure that every expected tensor is there with its shape.

    Raises:
        CheckpointError: the first tensor that is absent or of another shape, and how many more there are.
    """
    misfits = [name for name, shape in expected.items() if name not in headers or headers[name].shape != tuple(shape)]
    if misfits:
        name = misfits[0]
        found = f"has the shape {list(headers[name].shape)}" if name in headers else "is absent"
        more = f" {len(misfits) - 1} more do not fit either." if misfits[1:] else ""
        raise CheckpointError(f"Tensor {name} {found}; config.json needs the shape {list(expected[name])}.{more}")


class CheckpointReader:
    """The tensors of a model folder, known by their headers and read on demand.

    Tensors are read into memory of their own rather than mapped: the pages of a mapped shard stay resident as long as
    one view of it lives, so that a model read layer by layer would be in memory as a whole at the end.
    """

    headers: Mapping[str, TensorHeader]

    def __init__(self, folder: Path, headers: Mapping[str, TensorHeader] | None = None) -> None:
        """Read the index and the header of every shard, and no weights.

        Args:
            folder: of the model.
            headers: what was read before, under the names that tensors are to be asked for by.

        Raises:
            CheckpointError: shards that are absent, truncated or outside the folder, or that contradict the index.
        """
        self.folder = folder
        self.headers = MappingProxyType(dict(_read_all_headers(folder) if headers is None else headers))

    def check(self, expected: Mapping[str, torch.Size]) -> None:
        """Make sure that every expected tensor is there with its shape; see ``check_headers``."""
        check_headers(self.headers, expected)

    def read(self, names: Iterable[str], *, finite: bool = True) -> dict[str, Tensor]:
        """Return CPU tensors in their storage type, in the order asked for.

        Args:
            names: Tensor names; each must be in ``headers``.
            finite: Refuse NaN and infinite values.

        Raises:
            CheckpointError: a shard that cannot be read any more, or a value that is not finite.
        """
        wanted = [self.headers[name] for name in names]
        shards = defaultdict(list)
        for header in wanted:
            shards[header.file].append(header)
        tensors: dict[str, Tensor] = {}
        for shard, headers in shards.items():
            tensors |= _read_tensors(find_file(self.folder, shard), headers)
        if finite:
            for name, tensor in tensors.items():
                check_finite(name, tensor)
        return {header.name: tensors[header.name] for header in wanted}

    def read_part(self, name: str, index: int) -> Tensor:
        """Return what stands at ``index`` of a tensor's first axis, and read no more than that.

        Raises:
            CheckpointError: see ``read``.
        """
        whole = self.headers[name]
        shape = whole.shape[1:]
        offset = whole.offset + index * math.prod(shape) * whole.dtype.itemsize
        part = replace(whole, shape=shape, offset=offset)
        [tensor] = _read_tensors(find_file(self.folder, part.file), [part]).values()
        check_finite(name, tensor)
        return tensor


def _read_all_headers(folder: Path) -> dict[str, TensorHeader]:
    # As in transformers, a single file wins over an index left beside it.
    if (folder / SINGLE_FILE).is_file():
        return read_headers(find_file(folder, SINGLE_FILE))
    if not (folder / INDEX_FILE).is_file():
        raise CheckpointError(no_weights(str(folder), folder))
    weight_map = read_json(folder, INDEX_FILE).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(shard, str) for shard in weight_map.values()):
        raise CheckpointError(f"{folder / INDEX_FILE} has no weight_map from tensors to shards.")
    headers: dict[str, TensorHeader] = {}
    for shard in dict.fromkeys(weight_map.values()):
        found = read_headers(find_file(folder, shard))
        if twice := found.keys() & headers.keys():
            name = min(twice)
            raise CheckpointError(f"Tensor {name} is in two shards, {headers[name].file} and {shard}.")
        headers |= found
    for name, shard in weight_map.items():
        if name not in headers or headers[name].file != shard:
            raise CheckpointError(f"The index places tensor {name} in {shard}, but the shard does not hold it.")
    return headers


def _read_tensors(path: Path, headers: Iterable[TensorHeader]) -> dict[str, Tensor]:
    tensors = {}
    with path.open("rb") as file:
        for header in sorted(headers, key=lambda header: header.offset):
            data = torch.empty(header.nbytes, dtype=torch.uint8)
            file.seek(header.offset)
            if file.readinto(data.numpy().data) != header.nbytes:
                raise CheckpointError(f"Shard {header.file} ended while {header.name} was read; it has been changed.")
            tensors[header.name] = data.view(header.dtype).reshape(header.shape)
    return tensors
