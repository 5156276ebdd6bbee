"""Writing a planned checkpoint, tensor by tensor, in any order and across interruptions.

The shards get their final size and their headers first. From then on each tensor has its place, nothing is held back
until a shard is full, and a disk that is too small is noticed before the computation rather than after it.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from transmla.checkpoint.disk import fsync
from transmla.checkpoint.safetensors import INDEX_FILE, check_finite
from transmla.checkpoint.shards import ShardPlan, TensorPlan
from transmla.errors import OutputError


class CheckpointWriter:
    """The planned weight files of one folder, being filled.

    A caller that wants to resume calls ``flush``, notes what is safe, and gives it to ``mark_written`` next time.
    """

    def __init__(
        self,
        folder: Path,
        shards: Sequence[ShardPlan],
        *,
        resume: bool = False,
        check: Callable[[], None] = lambda: None,
    ) -> None:
        """Create every shard at its final size, with its header.

        Args:
            folder: An existing folder.
            shards: From ``plan_shards``.
            resume: The shards are there already, created from the same plan.
            check: Called before each tensor is written; may stop that by an error.

        Raises:
            OutputError: the disk is too small or refuses, or the shards to resume are absent or of another plan.
        """
        self._folder, self._check = folder, check
        self._shards = tuple(shards)
        self._places: dict[str, tuple[ShardPlan, TensorPlan, int]] = {
            tensor.name: (shard, tensor, offset)
            for shard in shards
            for tensor, offset in zip(shard.tensors, shard.offsets, strict=True)
        }
        self._missing = set(self._places)
        self._unsynced: set[Path] = set()
        for shard in shards:
            if resume:
                _check_same_plan(folder / shard.file_name, shard)
            else:
                self._create(folder / shard.file_name, shard)

    def mark_written(self, names: Iterable[str]) -> None:
        """Trust that an earlier, interrupted run has written and flushed these tensors."""
        names = set(names)
        assert names <= self._places.keys(), f"not in the plan: {sorted(names - self._places.keys())}"
        self._missing -= names

    def write(self, tensors: Mapping[str, Tensor]) -> None:
        """Write tensors at their places; nothing is cast, and one at a time is brought to the CPU.

        Raises:
            CheckpointError: a value is NaN or infinite.
            OutputError: the disk refuses.
        """
        for name, tensor in tensors.items():
            shard, plan, offset = self._places[name]
            assert tensor.dtype == plan.dtype, f"{name} is {tensor.dtype}, planned {plan.dtype}"
            assert tensor.shape == plan.shape, f"{name} is {list(tensor.shape)}, planned {list(plan.shape)}"
            check_finite(name, tensor)
            data = tensor.detach().to("cpu").contiguous().flatten().view(torch.uint8).numpy().data
            path = self._folder / shard.file_name
            self._check()
            try:
                with path.open("r+b") as file:
                    file.seek(offset)
                    file.write(data)
            except OSError as error:
                raise self._failure(error) from None
            self._unsynced.add(path)
            self._missing.discard(name)

    def read(self, names: Iterable[str]) -> dict[str, Tensor]:
        """Read back tensors that have been written, by this run or by the one that it resumes."""
        tensors = {}
        for name in names:
            assert name not in self._missing, f"{name} has not been written"
            shard, plan, offset = self._places[name]
            with (self._folder / shard.file_name).open("rb") as file:
                file.seek(offset)
                data = bytearray(file.read(plan.nbytes))
            # PyTorch makes no tensor of an empty buffer.
            flat = torch.frombuffer(data, dtype=plan.dtype) if data else torch.empty(0, dtype=plan.dtype)
            tensors[name] = flat.reshape(plan.shape)
        return tensors

    def flush(self) -> None:
        """Wait until everything written so far is on the disk.

        Raises:
            OutputError: the disk refuses.
        """
        try:
            for path in self._unsynced:
                fsync(path)
        except OSError as error:
            raise self._failure(error) from None
        self._unsynced.clear()

    def finish(self) -> None:
        """Write the index, if there are several shards, once every planned tensor has been written.

        Raises:
            OutputError: the disk refuses.
        """
        assert not self._missing, f"{len(self._missing)} planned tensors were not written, such as {min(self._missing)}"
        self.flush()
        if len(self._shards) == 1:
            return
        index = {
            "metadata": {"total_size": sum(plan.nbytes for _, plan, _ in self._places.values())},
            "weight_map": {name: shard.file_name for name, (shard, _, _) in self._places.items()},
        }
        try:
            (self._folder / INDEX_FILE).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
        except OSError as error:
            raise self._failure(error) from None

    def _create(self, path: Path, shard: ShardPlan) -> None:
        try:
            with path.open("wb") as file:
                _allocate(file.fileno(), shard.nbytes)
                file.write(shard.header)
        except OSError as error:
            raise self._failure(error) from None
        self._unsynced |= {path, self._folder}

    def _failure(self, error: OSError) -> OutputError:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            return OutputError(f"The weights cannot be written to {self._folder}: {error.strerror}.")
        needed = sum(shard.nbytes for shard in self._shards)
        free = shutil.disk_usage(self._folder).free
        return OutputError(
            f"The disk of {self._folder} is full: the weights need {needed:,} bytes in all and {free:,} are free. "
            "Free some space or choose another output folder."
        )


def _allocate(descriptor: int, size: int) -> None:
    """Give the file its size, with blocks reserved where the system can do that."""
    try:
        os.posix_fallocate(descriptor, 0, size)
    except AttributeError:  # macOS
        os.truncate(descriptor, size)
    except OSError as error:
        if error.errno not in (errno.EOPNOTSUPP, errno.EINVAL, errno.ENOSYS):
            raise
        os.truncate(descriptor, size)


def _check_same_plan(path: Path, shard: ShardPlan) -> None:
    try:
        with path.open("rb") as file:
            same = path.stat().st_size == shard.nbytes and file.read(len(shard.header)) == shard.header
    except FileNotFoundError:
        same = False
    if not same:
        raise OutputError(f"{path} does not fit the plan, so its run cannot be resumed; delete {path.parent}.")
