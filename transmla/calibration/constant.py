"""A functional of a layer's input that is nearly 1 for every token (ALGORITHM.md §6).

Trained models have directions that all tokens share, so that some weighted sum of the input hardly changes from token
to token. It can stand in for a constant where an engine has no place for one.
"""

import torch
from jaxtyping import Float, Float64
from torch import Tensor

# Pull towards zero, as a share of the mean square of an input.
_RIDGE = 1e-6


def near_constant(
    moment: Float64[Tensor, "hidden hidden"], mean: Float[Tensor, " hidden"]
) -> Float64[Tensor, " hidden"]:
    """Return u with u·x near 1: the least squares solution C⁻¹ μ.

    Args:
        moment: C = E[x xᵀ].
        mean: μ = E[x].
    """
    pull = _RIDGE * moment.diagonal().mean() + torch.finfo(torch.float32).tiny
    return torch.linalg.solve(moment + pull * torch.eye(len(moment)).to(moment), mean.double())


def near_constant_of(inputs: Float[Tensor, "windows tokens hidden"], *, batch_size: int) -> Float[Tensor, " hidden"]:
    """Return the functional that is nearest to 1 on these inputs."""
    moment = inputs.new_zeros(inputs.shape[-1], inputs.shape[-1], dtype=torch.float64)
    for batch in inputs.split(batch_size):
        flat = batch.flatten(0, 1)
        moment += flat.mT @ flat
    count = inputs.shape[0] * inputs.shape[1]
    return near_constant(moment / count, inputs.mean((0, 1))).to(inputs)
