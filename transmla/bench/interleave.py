"""Models that are measured against each other: interleaved runs of the same workload.

All are in memory at once, and in every round each of them runs once, so that a machine that slows down slows all of
them down. A conversion is one model in two forms, expanded and absorbed, switched in place.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Protocol, runtime_checkable

from transformers import PreTrainedModel

from transmla.bench.memory import is_out_of_memory, memory_limit, release_memory
from transmla.bench.timing import Run
from transmla.modeling.absorption import has_latent_attention, set_form
from transmla.records import Form


@runtime_checkable
class Workload(Protocol):
    """What every variant has to do."""

    def __call__(self, model: PreTrainedModel, *, memory: bool) -> Run:
        """Do it once, and measure memory if asked to."""
        ...


@dataclass(frozen=True)
class Variant:
    """A model in one of its forms, and the bytes of its weights."""

    name: str
    model: PreTrainedModel
    form: Form
    weight_bytes: int

    def activate(self) -> PreTrainedModel:
        """Return the model, in this form."""
        return set_form(self.model, self.form)


@dataclass
class Runs:
    """The runs of one variant, the one that measured memory first, and what ended them early."""

    runs: list[Run] = field(default_factory=list)
    problem: str | None = None

    @property
    def first_seconds(self) -> tuple[float, ...]:
        """Seconds to the first token in each timed round."""
        return tuple(run.first_seconds for run in self.runs[1:])

    @property
    def decode_seconds(self) -> tuple[float, ...]:
        """Seconds of all tokens after it in each timed round."""
        return tuple(run.decode_seconds for run in self.runs[1:])


def variants_of(name: str, model: PreTrainedModel) -> list[Variant]:
    """Return a model expanded, as stock transformers runs it, and where it has latent attention absorbed, too."""
    forms: tuple[Form, ...] = ("expanded", "absorbed") if has_latent_attention(model) else ("expanded",)
    storages = (tensor.untyped_storage() for tensor in (*model.parameters(), *model.buffers()))
    # Shared ones once; the absorbed form adds none.
    weight_bytes = sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())
    return [Variant(name, model, form, weight_bytes) for form in forms]


def run_interleaved(
    variants: Sequence[Variant], work: Workload, *, num_rounds: int, advance: Callable[[int], None] = lambda steps: None
) -> list[Runs]:
    """Run the workload with all variants in turn, round after round; the first round warms up and measures memory.

    A variant whose memory is too little drops out, and the others go on.
    """
    results = [Runs() for _ in variants]
    for number in range(num_rounds + 1):
        for variant, runs in zip(variants, results, strict=True):
            if runs.problem is None:
                run = attempt(variant, work, memory=number == 0)
                if run is None:
                    runs.problem = "out of memory"
                else:
                    runs.runs.append(run)
            advance(1)
    return results


def attempt(variant: Variant, work: Workload, *, memory: bool) -> Run | None:
    """Do the work once; ``None`` if memory is too little, with all that the attempt took given back."""
    model = variant.activate()
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
