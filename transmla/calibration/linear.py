"""Projections that are not linear in the layer's input, as the linear maps that come nearest to them.

MLA has nothing between the layer input and queries, keys and values but matrices, and many an engine no biases on them.
Two things of some sources are in the way, and both are met by one regression on what the layer really is given:

- *QK-norm* (Qwen3): y = γ ⊙ W x / rms(W x), head by head;
- *biases* (Qwen2), where they are not kept: y = W x + b. Trained models have directions that all tokens share, so some
  functional u·x is nearly 1, and the regression is W + b uᵀ with the best such u (ALGORITHM.md §6).

It starts from the crude answer, one factor for each number of y, and adds what the text supports.
"""

from collections.abc import Iterable, Mapping

import torch
from jaxtyping import Float, Float64
from torch import Tensor

# Pull towards the crude answer, or towards zero, as a share of the mean square of an input.
_RIDGE = 1e-6


@torch.no_grad()
def nearest_linear(
    seen: Iterable[tuple[Float[Tensor, "_ _ hidden"], Mapping[str, Float[Tensor, "_ _ _"]]]],
    weights: Mapping[str, Float[Tensor, "_ hidden"]],
    *,
    ridge: float = _RIDGE,
) -> dict[str, Float[Tensor, "_ hidden"]]:
    """Return for each projection the matrix B that minimises E‖y − B x‖².

    Args:
        seen: batches of inputs x, and what each projection made of them, y.
        weights: W of each projection.
        ridge: pull towards W with one factor for each number of y; infinite for nothing else.
    """
    device = next(iter(weights.values())).device
    hidden = next(iter(weights.values())).shape[1]
    moment = torch.zeros(hidden, hidden, dtype=torch.float64, device=device)
    cross = {name: torch.zeros(weight.shape, dtype=torch.float64, device=device) for name, weight in weights.items()}
    count = 0
    for inputs, outputs in seen:
        flat = inputs.float().flatten(0, 1)
        moment += flat.mT @ flat
        count += len(flat)
        for name, made in outputs.items():
            cross[name] += made.float().flatten(0, 1).mT @ flat
    moment, tiny = moment / count, torch.finfo(torch.float32).tiny
    pulled = moment + (ridge * moment.diagonal().mean() + tiny) * torch.eye(hidden).to(moment)
    found = {}
    for name, weight in weights.items():
        wanted, plain = cross[name] / count, weight.double()
        size = (plain @ moment * plain).sum(-1, keepdim=True)
        crude = plain * ((wanted * plain).sum(-1, keepdim=True) / size.clamp_min(tiny))
        found[name] = (crude + torch.linalg.solve(pulled, (wanted - crude @ moment).mT).mT).to(weight)
    return found


def near_constant(
    moment: Float64[Tensor, "hidden hidden"], mean: Float[Tensor, " hidden"]
) -> Float64[Tensor, " hidden"]:
    """Return u with u·x near 1: the least squares solution C⁻¹ μ (ALGORITHM.md §6).

    Args:
        moment: C = E[x xᵀ].
        mean: μ = E[x].
    """
    pull = _RIDGE * moment.diagonal().mean() + torch.finfo(torch.float32).tiny
    return torch.linalg.solve(moment + pull * torch.eye(len(moment)).to(moment), mean.double())
