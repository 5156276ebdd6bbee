"""In which order a training sees its data: every sequence once a pass, however many processes and workers read it.

The order of a pass follows from the seed and its number alone, so that a run that is resumed goes on where it was.
"""

from __future__ import annotations

import math
import random
from collections.abc import Iterator
from typing import Any

from torch.utils.data import DataLoader, Sampler, default_collate
from transformers import TrainerCallback, TrainingArguments

from transmla.finetune.data.packing import Filler, PackedDataset, Sequences


class PassSampler(Sampler[list[int]]):
    """The batches of one process.

    Where the last sequences of a pass are too few for all processes, some get a :class:`Filler`: all must run the
    model equally often.
    """

    def __init__(
        self, num_sequences: int, *, batch_size: int, seed: int, process_index: int = 0, num_processes: int = 1
    ) -> None:
        self._num_sequences, self._seed, self._epoch = num_sequences, seed, 0
        self._at_once = batch_size * num_processes
        self._share = slice(process_index, None, num_processes)

    def set_epoch(self, epoch: int) -> None:
        """Shuffle for a pass."""
        self._epoch = epoch

    def __len__(self) -> int:
        return math.ceil(self._num_sequences / self._at_once)

    def __iter__(self) -> Iterator[list[int]]:
        order = list(range(self._num_sequences))
        # By a text, of which all counts: torch's generators read 32 bits of a number.
        random.Random(f"{self._seed}, {self._epoch}").shuffle(order)
        for start in range(0, self._num_sequences, self._at_once):
            together = order[start : start + self._at_once]
            yield together[self._share] or [Filler(together[0])]


def pass_loader(dataset: PackedDataset, arguments: TrainingArguments) -> DataLoader[Sequences]:
    """Return what loads one process's batches."""
    sampler = PassSampler(
        len(dataset),
        batch_size=arguments.train_batch_size,
        seed=arguments.seed,
        process_index=arguments.process_index,
        num_processes=arguments.world_size,
    )
    return DataLoader(dataset, batch_sampler=sampler, collate_fn=default_collate, **worker_options(arguments))


def worker_options(arguments: TrainingArguments) -> dict[str, Any]:
    """Return how a loader is to read, in its own words."""
    return {
        "num_workers": arguments.dataloader_num_workers,
        "pin_memory": arguments.dataloader_pin_memory,
        "persistent_workers": arguments.dataloader_persistent_workers,
        "prefetch_factor": arguments.dataloader_prefetch_factor,
        "multiprocessing_context": getattr(arguments, "dataloader_multiprocessing_context", None),
    }


class NextPass(TrainerCallback):
    """Has each pass over the data come in another order, and cut texts at other places."""

    def __init__(self, dataset: PackedDataset, *, recut: bool) -> None:
        self._dataset, self._recut = dataset, recut

    def on_epoch_begin(self, args: Any, state: Any, control: Any, train_dataloader: Any = None, **_: Any) -> None:
        """Tell the data which pass it is; resumed, one begins somewhere within."""
        epoch = int(state.epoch)
        train_dataloader.batch_sampler.set_epoch(epoch)
        if self._recut:
            self._dataset.set_epoch(epoch)
