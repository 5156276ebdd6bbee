"""Cross-entropy and divergence from a teacher without ever holding all logits.

The logits of a batch are its tokens times the vocabulary, with their gradient several times over by far the largest
tensors of a training step, yet each position's are needed once. So a chunk of positions gets its logits, its loss and
its gradient at once, and only the gradient with respect to hidden states (and to the head, where it is trained) stays.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn.functional import linear

CHUNK_NUMBERS, CPU_CHUNK_NUMBERS = 2**26, 2**23
"""Logits that exist at once: 256 MB in float32, which keep a GPU busy, or 32 MB."""


@runtime_checkable
class Targets(Protocol):
    """What a teacher says about the positions of a batch."""

    def divergence(
        self, student: Float[Tensor, "positions vocab"], rows: slice, temperature: float
    ) -> Float[Tensor, " positions"]:
        """Return KL(teacher || student), in nats, at each of the positions ``rows``.

        ``student`` holds the logarithms of the student's probabilities at the temperature.
        """
        ...

    def entropies(self, chunk: int) -> Float[Tensor, " positions"]:
        """Return the entropy of the teacher's probabilities, in nats, at all positions, ``chunk`` of them at once."""
        ...


@dataclass(frozen=True)
class Mix:
    """How the loss is put together: (1 - ce_weight) · T² · KL + ce_weight · cross-entropy.

    T² keeps the gradient's size whatever the temperature T (Hinton et al., arXiv:1503.02531, section 2).

    Attributes:
        hard_label_share: share of the positions of each sequence, those where the teacher's entropy is lowest, at which
            the loss is cross-entropy alone: soft labels are noise where the truth is certain, and weaken induction
            heads (arXiv:2509.01649).
    """

    ce_weight: float
    temperature: float = 1.0
    hard_label_share: float = 0.0


@dataclass(frozen=True)
class LossSums:
    """Sums over positions, in nats: the loss, which has a gradient, and two numbers that have none."""

    loss: Float[Tensor, ""]
    nll: Float[Tensor, ""]
    kl: Float[Tensor, ""]


def chunked_loss(
    hidden: Float[Tensor, "positions hidden"],
    head: nn.Linear,
    labels: Int[Tensor, " positions"],
    targets: Targets | None,
    mix: Mix,
    *,
    lengths: Sequence[int] | None = None,
    chunk: int | None = None,
) -> LossSums:
    """Return the loss of hidden states, as sums over the positions.

    Args:
        hidden: what the decoder puts out.
        head: makes logits of it.
        labels: the token that comes next.
        targets: what the teacher says of it; without one the loss is cross-entropy alone, and the divergence zero.
        mix: how the loss is put together.
        lengths: positions of each sequence, in order; without them all are of one.
        chunk: positions that have their logits at once; by default as many as the device can well have.
    """
    if chunk is None:
        numbers = CPU_CHUNK_NUMBERS if hidden.device.type == "cpu" else CHUNK_NUMBERS
        chunk = max(1, numbers // len(head.weight))
    ce_weight = None if targets is None else _ce_weights(targets, mix, labels, lengths or [len(labels)], chunk)
    weight = head.weight
    if torch.is_autocast_enabled(hidden.device.type):
        # Once, and not for each chunk.
        weight = weight.to(torch.get_autocast_dtype(hidden.device.type))

    def score(logits: Tensor, rows: slice) -> Tensor:
        student = logits.float().log_softmax(-1)
        nll = nn.functional.nll_loss(student, labels[rows], reduction="none")
        if targets is None or ce_weight is None:
            return torch.stack([nll.sum(), nll.detach().sum(), torch.zeros_like(nll.detach().sum())])
        if mix.temperature != 1:
            student = (logits.float() / mix.temperature).log_softmax(-1)
        kl = targets.divergence(student, rows, mix.temperature)
        share = ce_weight[rows]
        loss = (1 - share) * mix.temperature**2 * kl + share * nll
        return torch.stack([loss.sum(), nll.detach().sum(), kl.detach().sum()])

    loss, nll, kl = _Chunked.apply(hidden, weight, score, chunk).unbind()
    return LossSums(loss, nll.detach(), kl.detach())


@torch.no_grad()
def _ce_weights(
    targets: Targets, mix: Mix, labels: Int[Tensor, " positions"], lengths: Sequence[int], chunk: int
) -> Float[Tensor, " positions"]:
    """Return what cross-entropy counts at each position."""
    weights = torch.full(labels.shape, mix.ce_weight, device=labels.device)
    # A process may have nothing to learn from, and only keeps in step with the others.
    if len(labels) and mix.hard_label_share and mix.ce_weight < 1:
        # By sequences, so that batches and processes make no difference.
        parts = zip(targets.entropies(chunk).split(list(lengths)), weights.split(list(lengths)), strict=True)
        for entropies, part in parts:
            part[entropies.argsort(stable=True)[: round(mix.hard_label_share * len(part))]] = 1.0
    return weights


class _Chunked(torch.autograd.Function):
    """Sums of a score over chunks of positions; the gradient is that of the first one."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, score: Callable[[Tensor, slice], Tensor], chunk: int
    ) -> Tensor:
        # Hidden states always have a gradient where the head has one.
        training, trained_head = ctx.needs_input_grad[:2]
        gradient = torch.empty_like(hidden) if training else None
        sums = torch.zeros(3, device=hidden.device)
        head = weight.detach().requires_grad_(trained_head)
        if trained_head and not len(hidden):
            # Nothing to learn here: other processes wait for a gradient all the same.
            head.grad = torch.zeros_like(head)
        for start in range(0, len(hidden), chunk):
            rows = slice(start, start + chunk)
            part = hidden[rows].detach()
            if gradient is None:
                sums += score(linear(part, head), rows)
                continue
            with torch.enable_grad():
                some = score(linear(part.requires_grad_(), head), rows)
                some[0].backward()
            sums += some.detach()
            assert part.grad is not None
            gradient[rows] = part.grad
        ctx.save_for_backward(gradient, head.grad)
        return sums

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        hidden, weight = (None if saved is None else saved * gradient[0] for saved in ctx.saved_tensors)
        return hidden, weight, None, None
