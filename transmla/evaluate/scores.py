"""Perplexity of one model, and agreement of two, over many windows.

A window predicts all of its tokens but the first, and every predicted position counts alike. Sums are kept in float64:
the loss of an exact conversion differs from its source's in the seventh digit, which a float32 sum would swallow.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from transformers import PreTrainedModel

from transmla.errors import CheckpointError
from transmla.evaluate.logprobs import pair_scores, token_nll


@dataclass(frozen=True)
class Loss:
    """Mean negative log-likelihood in nats per predicted token."""

    nll: float
    num_positions: int

    @property
    def perplexity(self) -> float:
        """Return ``exp(nll)``, or infinity where that leaves the range of a float."""
        return math.exp(self.nll) if self.nll < 709 else math.inf


@dataclass(frozen=True)
class Agreement:
    """How far a converted model is from its source on the same positions.

    ``kl`` is ``KL(source || converted)`` in nats; ``top1_agreement`` is the share of positions
    where both put the same token first.
    """

    source: Loss
    converted: Loss
    kl: float
    top1_agreement: float

    @property
    def excess_nll(self) -> float:
        """Return how much more loss the conversion has than its source."""
        return self.converted.nll - self.source.nll


def _ignore(windows: int) -> None:
    pass


@torch.inference_mode()
def measure_loss(
    model: PreTrainedModel,
    windows: Int[Tensor, "windows window"],
    *,
    batch_size: int = 1,
    advance: Callable[[int], None] = _ignore,
) -> Loss:
    """Average the loss over all predicted positions.

    ``advance`` is called with the number of windows just done.

    Raises:
        CheckpointError: the loss is not finite.
    """
    nll = _Mean()
    for batch in windows.split(batch_size):
        nll.add(_finite(token_nll(model, batch.to(model.device)), model))
        advance(len(batch))
    return nll.as_loss()


@torch.inference_mode()
def measure_agreement(
    source: PreTrainedModel,
    converted: PreTrainedModel,
    windows: Int[Tensor, "windows window"],
    *,
    batch_size: int = 1,
    advance: Callable[[int], None] = _ignore,
) -> Agreement:
    """Average both losses, the divergence and the share of equal first choices over all predicted positions.

    ``advance`` is called with the number of windows just done.

    Raises:
        CheckpointError: a loss is not finite.
    """
    source_nll, converted_nll, kl, agrees = _Mean(), _Mean(), _Mean(), _Mean()
    for batch in windows.split(batch_size):
        scores = pair_scores(source, converted, batch.to(source.device))
        source_nll.add(_finite(scores.source_nll, source))
        converted_nll.add(_finite(scores.converted_nll, converted))
        kl.add(scores.kl)
        agrees.add(scores.agrees)
        advance(len(batch))
    # A divergence is never negative, but the rounding of one that is zero may be.
    return Agreement(source_nll.as_loss(), converted_nll.as_loss(), max(0.0, kl.value), agrees.value)


class _Mean:
    def __init__(self) -> None:
        self.total, self.count = 0.0, 0

    def add(self, values: Float[Tensor, "windows predicted"] | Bool[Tensor, "windows predicted"]) -> None:
        # On the CPU first: Apple's devices have no float64.
        self.total += values.cpu().sum(dtype=torch.float64).item()
        self.count += values.numel()

    @property
    def value(self) -> float:
        return self.total / self.count

    def as_loss(self) -> Loss:
        return Loss(self.value, self.count)


def _finite(nll: Float[Tensor, "windows predicted"], model: PreTrainedModel) -> Float[Tensor, "windows predicted"]:
    if nll.isfinite().all():
        return nll
    dtype = str(model.dtype).removeprefix("torch.")
    raise CheckpointError(
        f"The loss of {model.name_or_path} is not finite in {dtype}: "
        + ("its weights are damaged." if model.dtype == torch.float32 else "try --dtype float32.")
    )
