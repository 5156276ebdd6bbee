"""A latent norm that is really one, and yet changes little: RMSNorm with an anchor.

RMSNorm divides a latent by its length, and with it go the sizes of keys and values. So one of its numbers, the anchor,
is spent on the length: a functional of the layer input that is as nearly 1 for every token as text allows
(docs/concepts/algorithm.md, "Fitted latent norm"), written so large that nothing else counts in the norm. What the norm
then does to the others is a factor near 1. Least squares undoes what of it can be undone, with the anchor, a constant
by then, for an offset.
"""

import torch
from jaxtyping import Float, Float64
from torch import Tensor

# Hard-coded for the latent norm in transformers and MLX
# (docs/concepts/checkpoint-format.md, "The eps and the residual stream").
LATENT_EPS = 1e-6
# Squared size of the anchor, beside the longest latent of the text: at most a twentieth is off by the rest.
_ANCHOR = 10.0
# Pull on the least squares, as a share of what is squared.
_RIDGE = 1e-6


def unit_size(latent: Float[Tensor, "*batch rank"]) -> Float[Tensor, "*batch rank"]:
    """Do what RMSNorm does before its weight; in float32 at least, like the engines."""
    latent = latent.to(torch.promote_types(latent.dtype, torch.float32))
    return latent * torch.rsqrt(latent.square().mean(-1, keepdim=True) + LATENT_EPS)


def anchored(
    rows: Float[Tensor, "rank hidden"], anchor: Float[Tensor, " hidden"], longest: Float[Tensor, ""]
) -> Float[Tensor, "rank_and_1 hidden"]:
    """Add the anchor, as the last row, and give all rows the size that the norm would give them.

    Args:
        rows: of the down-projection.
        anchor: a functional of the input that is nearly 1.
        longest: largest squared length of a latent.
    """
    # A layer whose latents are all zero has nothing to be longer than.
    size = torch.where(longest > 0, _ANCHOR * longest, 1.0).sqrt()
    both = torch.cat([rows, (size * anchor).unsqueeze(0)])
    return both * (len(both) ** 0.5 / size)


def norm_and_readout(
    gram: Float64[Tensor, "rank_and_1 rank_and_1"], cross: Float64[Tensor, "rank rank_and_1"]
) -> tuple[Float64[Tensor, " rank_and_1"], Float64[Tensor, "rank rank_and_1"]]:
    """Return the norm's weight, and what makes the old latents of the ones after the norm.

    Args:
        gram: Σ n nᵀ of the latents n after the norm, before its weight.
        cross: Σ c nᵀ with the old latents c.
    """
    energy = gram.diagonal().clamp_min(torch.finfo(torch.float32).tiny)
    # The weight brings each number back to its size; the anchor stays as it is.
    weight = torch.cat([cross.diagonal() / energy[:-1], energy.new_ones(1)])
    weight = torch.where(weight > 0, weight, 1.0)
    # What after the norm comes nearest to the old latent.
    regression = torch.linalg.solve(gram + torch.diag(_RIDGE * energy), cross.mT).mT
    return weight, regression / weight
