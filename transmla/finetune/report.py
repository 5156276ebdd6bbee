"""What a training has measured: ``transmla_finetune.json``."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from pydantic import computed_field

from transmla.records import Record


class Memory(Record):
    """Bytes on one device, where weights are not sharded.

    Attributes:
        num_trained: weights that are trained.
        frozen, trained: the two kinds of weights.
        optimizer: two moments of each trained weight.
        gradients: of each trained weight.
        activations: kept for the backward pass, and a chunk of logits.
        recomputed: what of them is there again beside the gradients, where layers are computed twice.
        teacher: weights of the teacher, if it is in memory.
    """

    num_trained: int
    frozen: int
    trained: int
    optimizer: int
    gradients: int
    activations: int
    recomputed: int
    teacher: int

    @computed_field  # type: ignore[prop-decorator]
    @property
    def peak(self) -> int:
        """Return the most at once: what is kept is gone when all gradients are there."""
        held = self.frozen + self.trained + self.optimizer + self.teacher
        return held + max(self.activations, self.gradients + self.recomputed)


class FinetunePlan(Record):
    """What a training would be.

    Attributes:
        num_shared_tokens: what the teacher teaches over, where that is not every token of both models.
        memory: on each device, where weights are not sharded.
        checkpoint_bytes: of one checkpoint on the disk, with all that resuming takes.
    """

    checkpoint: str
    teacher: str | None
    output_dir: str
    train: str
    num_trained_parameters: int
    num_sequences: int | None
    num_heldout_sequences: int
    steps: int
    tokens_per_step: int
    memory: Memory
    checkpoint_bytes: int
    num_shared_tokens: int | None = None
    not_learnt: tuple[str, ...] = ()


class HeldoutPoint(Record):
    """The held-out sequences at one step; nll and kl in nats a token, seconds since the start of the training.

    Attributes:
        repeat_nll: nll of what is said a second time in held-out repeats; ``None`` without repeats.
    """

    step: int
    num_tokens_seen: int
    loss: float
    nll: float
    perplexity: float
    kl: float
    seconds: float
    repeat_nll: float | None = None


class TrainingPoint(Record):
    """The training sequences since the point before."""

    step: int
    num_tokens_seen: int
    loss: float
    nll: float
    kl: float
    grad_norm: float
    learning_rate: float
    seconds: float


class FinetuneReport(Record):
    """Everything one needs to know where a trained checkpoint comes from.

    Attributes:
        format_version: of the report; 1 where none is written.
        num_shared_tokens: what the teacher has taught over, where that is not every token of both models.
        best_step: the step whose weights were published: least loss on what is held out, of those that copy no worse
            than the start.
        num_heldout_repeats: sequences of repeats by which copying is watched.
        sha256: of the tokens of the data.
        request: every choice, as the recipe has it.
        not_learnt: sentences on what of the data is not learnt, and why.
        checksums: SHA-256 of every weight file; none where an older version wrote them.
    """

    format_version: int = 1
    checkpoint: str
    teacher: str | None
    num_parameters: int
    num_trained_parameters: int
    num_sequences: int | None
    num_heldout_sequences: int
    num_heldout_repeats: int = 0
    window: int
    sha256: str
    steps: int
    best_step: int
    heldout: tuple[HeldoutPoint, ...]
    training: tuple[TrainingPoint, ...]
    num_processes: int
    request: dict[str, Any]
    versions: dict[str, str]
    checksums: dict[str, str] | None = None
    num_shared_tokens: int | None = None
    not_learnt: tuple[str, ...] = ()

    @property
    def best(self) -> HeldoutPoint | None:
        """Return what was measured of the weights that were published."""
        return next((point for point in self.heldout if point.step == self.best_step), None)


def best_point(heldout: Sequence[HeldoutPoint]) -> HeldoutPoint:
    """Return the point of least loss, of those that copy no worse than the first one: that is one of them."""
    return min(heldout, key=lambda point: (copies_worse(point.repeat_nll, heldout[0].repeat_nll), point.loss))


def copies_worse(repeat_nll: float | None, at_start: float | None) -> bool:
    """Return whether copying has suffered since the start of a training."""
    return repeat_nll is not None and at_start is not None and repeat_nll > at_start


def points_of(
    log_history: list[dict[str, Any]],
) -> tuple[tuple[HeldoutPoint, ...], tuple[TrainingPoint, ...]]:
    """Sort the log of a Trainer into points."""
    heldout, training = [], []
    for entry in log_history:
        common = {
            "step": entry["step"],
            "num_tokens_seen": int(entry.get("num_input_tokens_seen", 0)),
            "seconds": entry.get("seconds", 0.0),
        }
        if "eval_nll" in entry:
            measured = {name: entry[f"eval_{name}"] for name in ("loss", "nll", "perplexity", "kl")}
            heldout.append(HeldoutPoint(**common, **measured, repeat_nll=entry.get("eval_repeat_nll")))
        elif "kl" in entry:
            logged = {name: entry[name] for name in ("loss", "nll", "kl", "grad_norm", "learning_rate")}
            training.append(TrainingPoint(**common, **logged))
    return tuple(heldout), tuple(training)
