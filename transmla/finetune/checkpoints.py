"""What is written while training: native checkpoints, which engines load, and beside them what resuming takes.

    checkpoint-200/              a model like the one that came in
    checkpoint-200/training/     trained weights in float32 and plain scale, optimizer, schedule, random numbers

The native weights are those of the checkpoint that came in, tensor by tensor, but for what has been trained: the same
names, types and order. They are written a layer at a time.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable, Mapping
from itertools import groupby
from pathlib import Path

from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion

from transmla.checkpoint.model_files import RECIPE_FILE, REPORT_FILE, copy_model_files, read_report
from transmla.checkpoint.reader import CheckpointReader
from transmla.checkpoint.shards import TensorPlan, plan_shards
from transmla.checkpoint.source import Source
from transmla.checkpoint.writer import CheckpointWriter
from transmla.modeling.reparametrize import Reparametrization

TRAINING_FOLDER = "training"
_TRAINED_FILE = "trained.safetensors"


class NativeWriter:
    """Writes the trained model as a checkpoint of the kind that it came from."""

    def __init__(
        self, converted: Source, model: PreTrainedModel, plain: Reparametrization, *, max_shard_size: str
    ) -> None:
        """Read the headers.

        Args:
            converted: the checkpoint that is trained.
            model: as it was loaded; it knows how its experts are stored.
            plain: how its weights were changed.
            max_shard_size: largest size of a weight file.

        Raises:
            CheckpointError: the checkpoint cannot be read any more.
            UsageError: not a size.
        """
        self._converted, self._model, self._plain = converted, model, plain
        self._reader = CheckpointReader(converted.folder)
        tensors = [TensorPlan(header.name, header.shape, header.dtype) for header in self._reader.headers.values()]
        self._shards = plan_shards(tensors, max_shard_size=max_shard_size)

    @property
    def nbytes(self) -> int:
        """Return the size of the weight files."""
        return sum(shard.nbytes for shard in self._shards)

    def write(self, folder: Path, state: Mapping[str, Tensor]) -> None:
        """Write a whole model folder.

        Args:
            folder: an existing one.
            state: trained weights in plain scale; the others are copied.

        Raises:
            CheckpointError: a weight is not finite, or the checkpoint has been changed.
            OutputError: the disk refuses.
        """
        writer = CheckpointWriter(folder, self._shards)
        headers = self._reader.headers
        written: set[str] = set()
        for names in _by_layer(state):
            native = self._plain.native({name: state[name].detach() for name in names})
            if any(name not in headers for name in native):
                native = revert_weight_conversion(self._model, native)
            writer.write({name: tensor.to(headers[name].dtype) for name, tensor in native.items()})
            written |= native.keys()
        for name in headers.keys() - written:
            writer.write(self._reader.read([name]))
        writer.finish()
        copy_model_files(self._converted.folder, folder)
        for name in ("config.json", RECIPE_FILE):
            if (path := self._converted.folder / name).is_file():
                shutil.copyfile(path, folder / name)
        if (self._converted.folder / REPORT_FILE).is_file():
            # What it says of the weight files was said of others.
            report = read_report(self._converted.folder, REPORT_FILE) | {"checksums": None}
            (folder / REPORT_FILE).write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")


def _by_layer(names: Iterable[str]) -> Iterable[list[str]]:
    """Group the names of a state by decoder layer, in order."""
    for _, group in groupby(names, key=lambda name: name.split(".")[:3] if ".layers." in name else name):
        yield list(group)


def checkpoint_bytes(native_bytes: int, num_trained: int) -> int:
    """Return what a checkpoint takes: the model, and in float32 what is trained with its two moments."""
    return native_bytes + 3 * 4 * num_trained


def save_trained(folder: Path, state: Mapping[str, Tensor]) -> None:
    """Write trained weights as they are, for :func:`load_trained`."""
    tensors = {name: tensor.detach().to("cpu").contiguous() for name, tensor in state.items()}
    save_file(tensors, folder / _TRAINED_FILE)


def load_trained(folder: Path, model: nn.Module) -> None:
    """Put trained weights back into a model of the same kind."""
    _, unexpected = model.load_state_dict(load_file(folder / _TRAINED_FILE), strict=False)
    assert not unexpected, f"not in this model: {unexpected[0]}"
