"""A functional that is nearly 1 for every token: what stands for a constant where there is no bias.

Trained models have directions that all tokens share, so that there is such a functional in their residual stream.
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

    See docs/concepts/algorithm.md, "Biases and norms".

    Args:
        moment: C = E[x xᵀ].
        mean: μ = E[x].
    """
    pull = _RIDGE * moment.diagonal().mean() + torch.finfo(torch.float32).tiny
    return torch.linalg.solve(moment + pull * torch.eye(len(moment)).to(moment), mean.double())
