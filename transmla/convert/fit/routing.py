"""Softmax routing in a model whose routers are sigmoids.

Mixtral and Qwen weigh the chosen experts by a softmax over their logits, DeepSeek-V3 by sigmoid(l) / Σ sigmoid(l).
Far below zero a sigmoid is an exponential, so with all logits of a token lowered by the same large amount c the two
are the same to about e^(l − c), and so is the order of the experts (docs/concepts/algorithm.md, "Routers of
mixtures"). The amount cancels, and may differ from token to token: c = b u·x, with u a functional of the router's input
that is nearly 1, goes into the router's weight. Where there is no such functional (after the embedding, in a small
model), this is an approximation, and the report says so. Lowering the share of exchanged experts itself, by L-BFGS, got
it from 0.5 to 0.3 % there, but the model's KL was no better.
"""

import math

import torch
from jaxtyping import Float
from torch import Tensor

from transmla.linalg.near_constant import near_constant

# Engines add 1e-20 to the sum of the sigmoids; e^-40 is still 400 times as large.
_DEEPEST = 40.0
# A functional that hardly reaches a token would ask for any depth at all others.
_LEAST = 0.25


class RouterInputs:
    """What routers are given: moments over the fitted windows, and the inputs themselves on held-out ones."""

    def __init__(self, hidden: int, device: torch.device) -> None:
        """Start from nothing."""
        self._moment = torch.zeros(hidden, hidden, dtype=torch.float64, device=device)
        self._sum = torch.zeros(hidden, dtype=torch.float64, device=device)
        self._count = 0
        self._heldout: list[Tensor] = []

    def add(self, inputs: Float[Tensor, "batch tokens hidden"], *, heldout: bool) -> None:
        """Add a batch."""
        flat = inputs.float().flatten(0, 1)
        if heldout:
            self._heldout.append(flat)
            return
        self._moment += flat.mT @ flat
        self._sum += flat.sum(0)
        self._count += len(flat)

    def sigmoid_router(
        self, router: Float[Tensor, "experts hidden"], *, top_k: int, dtype: torch.dtype
    ) -> tuple[Float[Tensor, "experts hidden"], float]:
        """Return the router to store, and the share of a token's experts that it exchanges, on the held-out windows.

        Args:
            router: weight of the source's router.
            top_k: experts of a token.
            dtype: storage type. It rounds what is subtracted, so it is no more than the type can resolve.
        """
        constant = near_constant(self._moment / self._count, self._sum / self._count).float()
        inputs, weight = torch.cat(self._heldout), router.to(constant)
        logits, common = inputs @ weight.mT, inputs @ constant
        chosen, experts = logits.topk(top_k)
        margin = 2 - math.log(torch.finfo(dtype).eps)
        enough = ((chosen[:, 0] + margin) / common.clamp_min(_LEAST)).max()
        deepest = ((chosen[:, -1] + _DEEPEST) / common.clamp_min(_LEAST)).min()
        stored = (weight - enough.minimum(deepest).clamp_min(0) * constant).to(dtype)
        sigmoids = (inputs @ stored.float().mT).sigmoid()
        found = torch.zeros_like(logits).scatter(1, *_normalized(sigmoids, top_k))
        wanted = torch.zeros_like(logits).scatter(1, experts, chosen.softmax(-1))
        return stored, (found - wanted).abs().sum(-1).mean().item() / 2


def _normalized(scores: Tensor, top_k: int) -> tuple[Tensor, Tensor]:
    chosen, experts = scores.topk(top_k)
    return experts, chosen / chosen.sum(-1, keepdim=True)
