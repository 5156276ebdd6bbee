"""Models that are measured against each other: each in every form that it has, taking turns at the same work.

All are in memory at once, and in every round each of them runs once, so that a machine that slows down slows all of
them down. A conversion is one model in two forms, stock's and the absorbed one, switched in place.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Protocol, runtime_checkable

from transformers import PreTrainedModel

from transmla.evaluate.memory import is_out_of_memory, memory_limit, release_memory
from transmla.evaluate.timing import Run
from transmla.modeling import has_latent_attention
from transmla.modeling.absorption import set_form
from transmla.records import Form


@runtime_checkable
class Work(Protocol):
    """What every contender has to do."""

    def __call__(self, model: PreTrainedModel, *, memory: bool) -> Run:
        """Do it once, and measure memory if asked to."""
        ...


@dataclass(frozen=True)
class Contender:
    """A model in one of its forms, and the bytes of its weights."""

    name: str
    model: PreTrainedModel
    form: Form
    weight_bytes: int

    def step_up(self) -> PreTrainedModel:
        """Return the model, in this form."""
        return set_form(self.model, self.form)


@dataclass
class Turns:
    """The runs of one contender, the one that measured memory first, and what ended them early."""

    runs: list[Run] = field(default_factory=list)
    problem: str | None = None

    @property
    def first_seconds(self) -> tuple[float, ...]:
        """Seconds to the first token in each timed round."""
        return tuple(run.first_seconds for run in self.runs[1:])

    @property
    def decode_seconds(self) -> tuple[float, ...]:
        """Seconds of all tokens behind it in each timed round."""
        return tuple(run.decode_seconds for run in self.runs[1:])


def enter(name: str, model: PreTrainedModel) -> list[Contender]:
    """Enter a model in stock's form and, where it has latent attention, in the absorbed one."""
    forms: tuple[Form, ...] = ("expanded", "absorbed") if has_latent_attention(model) else ("expanded",)
    storages = (tensor.untyped_storage() for tensor in (*model.parameters(), *model.buffers()))
    # Shared ones once; the absorbed form adds none.
    weight_bytes = sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())
    return [Contender(name, model, form, weight_bytes) for form in forms]


def take_turns(
    contenders: Sequence[Contender], work: Work, *, num_rounds: int, advance: Callable[[int], None] = lambda steps: None
) -> list[Turns]:
    """Have all contenders do the work in turn, round after round; the first round warms up and measures memory.

    One whose memory is too little leaves, and the others go on.
    """
    results = [Turns() for _ in contenders]
    for number in range(num_rounds + 1):
        for contender, turns in zip(contenders, results, strict=True):
            if turns.problem is None:
                run = attempt(contender, work, memory=number == 0)
                if run is None:
                    turns.problem = "out of memory"
                else:
                    turns.runs.append(run)
            advance(1)
    return results


def attempt(contender: Contender, work: Work, *, memory: bool) -> Run | None:
    """Do the work once; ``None`` if memory is too little, with all that the attempt took given back."""
    model = contender.step_up()
    run = None
    try:
        with memory_limit(model.device):
            run = work(model, memory=memory)
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
    if run is None:
        # Outside the handler, whose traceback holds on to every tensor of the attempt.
        release_memory(model.device)
    return run
