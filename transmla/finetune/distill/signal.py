"""What the teacher says of a batch: it reads the batch now (online), or has done so before (cached logits).

What is written down lies in two files of one row for each sequence, ``logprobs.npy`` (float16) and ``tokens.npy``
(int32), mapped and not read: six bytes for each of the top tokens of each position.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy
import torch
from torch import Tensor
from torch.utils.data import Dataset, default_collate

from transmla.data.vocabulary import SharedTokens
from transmla.finetune.data.packing import Sequences
from transmla.finetune.distill.student import IGNORE_INDEX
from transmla.finetune.distill.teacher import Teacher, TeacherOutputs, TopTargets

_ROWS_AT_ONCE = 256


class NoSignal:
    """Cross-entropy alone."""

    def outputs_for(self, batch: Mapping[str, Tensor]) -> None:
        """Teach nothing."""
        return


@dataclass(frozen=True)
class OnlineSignal:
    """The teacher reads each batch."""

    teacher: Teacher

    def outputs_for(self, batch: Mapping[str, Tensor]) -> TeacherOutputs:
        """Have it read."""
        return self.teacher.teach(batch["input_ids"], batch["position_ids"], _counted(batch))


class CachedSignal:
    """The teacher has read everything; ``index`` in a batch says which sequences those are."""

    def __init__(self, folder: Path, *, shared: SharedTokens | None = None) -> None:
        """Map what :func:`cache_teacher_logits` wrote, about the ``shared`` tokens where those are not all."""
        self._shared = shared
        self._logprobs = numpy.load(folder / "logprobs.npy", mmap_mode="r")
        self._tokens = numpy.load(folder / "tokens.npy", mmap_mode="r")

    def outputs_for(self, batch: Mapping[str, Tensor]) -> TeacherOutputs:
        """Look it up."""
        rows, counted = batch["index"].cpu().numpy(), _counted(batch)
        logprobs, tokens = (
            torch.from_numpy(numpy.asarray(table[rows])).to(counted.device)[counted]
            for table in (self._logprobs, self._tokens)
        )
        return TeacherOutputs(TopTargets(logprobs, tokens, self._shared))


@torch.no_grad()
def cache_teacher_logits(
    teacher: Teacher,
    dataset: Dataset[Sequences],
    folder: Path,
    *,
    top: int,
    temperature: float,
    batch_size: int,
    device: torch.device,
    advance: Callable[[int], None],
) -> None:
    """Have a teacher read a whole data set, and keep its ``top`` largest probabilities for each token.

    Interrupted, it goes on where it was: ``done`` in the folder says how many sequences are.
    """
    folder.mkdir(exist_ok=True)
    count = len(dataset)  # type: ignore[arg-type]
    shape = (count, len(dataset[0]["labels"]) - 1, top)
    done_file = folder / "done"
    done = int(done_file.read_text(encoding="ascii")) if done_file.exists() else 0
    mode = "r+" if done else "w+"
    logprobs, tokens = (
        numpy.lib.format.open_memmap(folder / f"{name}.npy", mode=mode, dtype=dtype, shape=None if done else shape)
        for name, dtype in (("logprobs", numpy.float16), ("tokens", numpy.int32))
    )
    advance(done)
    for start in range(done, count, batch_size):
        stop = min(start + batch_size, count)
        batch = {
            key: value.to(device)
            for key, value in default_collate([dataset[index] for index in range(start, stop)]).items()
        }
        everything = torch.ones_like(batch["labels"][:, 1:], dtype=torch.bool)
        targets = teacher.read(batch["input_ids"], batch["position_ids"], everything)
        rows = range(0, everything.numel(), _ROWS_AT_ONCE)
        found = [targets.top(slice(row, row + _ROWS_AT_ONCE), top, temperature) for row in rows]
        for table, parts in zip((logprobs, tokens), zip(*found, strict=True), strict=True):
            table[start:stop] = torch.cat(parts).cpu().numpy().reshape(stop - start, *shape[1:])
            table.flush()
        unfinished = done_file.with_suffix(".new")
        unfinished.write_text(str(stop), encoding="ascii")
        unfinished.replace(done_file)
        advance(stop - start)


def _counted(batch: Mapping[str, Tensor]) -> Tensor:
    return batch["labels"][:, 1:] != IGNORE_INDEX
