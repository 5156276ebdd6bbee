"""A latent norm that is really one (``--latent-norm live``): RMSNorm with a fitted weight, not a neutralised one.

RMSNorm divides a latent by its length, and with it go the sizes of keys and values. So one of its numbers, the anchor,
is spent on the length: a functional of the layer input that is as nearly 1 for every token as text allows
(ALGORITHM.md §6), written so large that nothing else counts in the norm. What the norm then does to the others is a
factor near 1. Least squares undoes what of it can be undone, with the anchor, a constant by then, for an offset.

The rows are of ordinary size, so that blocks of 8 bits hold them, and no eps matters.
"""

from dataclasses import replace

import torch
from jaxtyping import Float64
from torch import Tensor

from transmla.calibration.linear import near_constant
from transmla.convert.latent import LatentAttention, unit_size
from transmla.convert.teacher import Lesson

# Squared size of the anchor, beside the longest latent of the text: at most a twentieth is off by the rest.
_ANCHOR = 10.0
# Pull on the least squares, as a share of what is squared.
_RIDGE = 1e-6


@torch.no_grad()
def live_norm(
    layer: LatentAttention, lesson: Lesson, moment: Float64[Tensor, "hidden hidden"], *, batch_size: int
) -> LatentAttention:
    """Return a layer with one more number in its latent, and a norm on all of them.

    Args:
        layer: factors without a norm.
        lesson: windows to fit on.
        moment: E[x xᵀ] of its inputs.
        batch_size: windows at once.
    """
    batches = [batch.inputs.flatten(0, 1) for batch in lesson.batches(batch_size)]
    anchor = near_constant(moment, lesson.inputs.flatten(0, 1).mean(0)).to(layer.latent)
    longest = max((batch @ layer.latent.mT).square().sum(-1).max() for batch in batches)
    # A layer whose latents are all zero has nothing to be longer than.
    size = torch.where(longest > 0, _ANCHOR * longest, 1.0).sqrt()
    rows = torch.cat([layer.latent, (size * anchor).unsqueeze(0)])
    rows = rows * (len(rows) ** 0.5 / size)
    rank = len(layer.latent)
    gram, cross = rows.new_zeros(rank + 1, rank + 1).double(), rows.new_zeros(rank, rank + 1).double()
    for batch in batches:
        normed = unit_size(batch @ rows.mT)
        gram += normed.mT @ normed
        cross += (batch @ layer.latent.mT).mT @ normed
    energy = gram.diagonal().clamp_min(torch.finfo(torch.float32).tiny)
    # The weight brings each number back to its size; the anchor stays as it is.
    weight = torch.cat([cross.diagonal() / energy[:-1], energy.new_ones(1)])
    weight = torch.where(weight > 0, weight, 1.0)
    # What behind the norm comes nearest to the old latent.
    regression = torch.linalg.solve(gram + torch.diag(_RIDGE * energy), cross.mT).mT
    old = (regression / weight).to(rows)
    return replace(
        layer,
        latent=rows,
        latent_norm=weight.to(rows),
        key_up=layer.key_up @ old,
        value_up=layer.value_up @ old,
    )
