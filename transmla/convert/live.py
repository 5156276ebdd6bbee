"""A latent norm that is really one (``--latent-norm live``): RMSNorm with a fitted weight, not a neutralised one.

RMSNorm divides a latent by its length, and with it go the sizes of keys and values. So one of its numbers, the anchor,
is spent on the length: a functional of the layer input that is as nearly 1 for every token as text allows
(ALGORITHM.md §6), written so large that nothing else counts in the norm. What the norm then does to the others is a
factor near 1. Least squares undoes what of it can be undone, with the anchor, a constant by then, for an offset.

The rows are of ordinary size, so that blocks of 8 bits hold them, and no eps matters.
"""

from dataclasses import replace

import torch
from jaxtyping import Float, Float64
from torch import Tensor

from transmla.convert.latent import LatentAttention
from transmla.convert.teacher import Lesson
from transmla.linalg.low_rank import pad

# Squared size of the anchor, beside the longest latent of the text: at most a twentieth is off by the rest.
_ANCHOR = 10.0
# Pull on the least squares, as a share of the mean of what is squared.
_RIDGE = 1e-6


@torch.no_grad()
def live_norm(layer: LatentAttention, lesson: Lesson, *, batch_size: int) -> LatentAttention:
    """Return a layer with one more number in its latent, and a norm on all of them.

    Args:
        layer: factors without a norm.
        lesson: windows to fit on.
        batch_size: windows at once.
    """
    batches = [batch.inputs.flatten(0, 1) for batch in lesson.batches(batch_size)]
    anchor = _near_constant(batches).to(layer.latent)
    longest = max((batch @ layer.latent.mT).square().sum(-1).max() for batch in batches)
    # A layer whose latents are all zero has nothing to be longer than.
    size = torch.where(longest > 0, _ANCHOR * longest, 1.0).sqrt()
    rows = torch.cat([layer.latent, (size * anchor).unsqueeze(0)])
    rows = rows * (len(rows) ** 0.5 / size)
    one = replace(
        layer,
        latent=rows,
        latent_norm=rows.new_ones(len(rows)),
        key_up=pad(layer.key_up, 2, len(rows)),
        value_up=pad(layer.value_up, 2, len(rows)),
    )
    # Behind the norm, before its weight: what there is to make the old latent of.
    rank = len(layer.latent)
    gram, cross = rows.new_zeros(rank + 1, rank + 1).double(), rows.new_zeros(rank, rank + 1).double()
    for batch in batches:
        normed = one.latents(batch)
        gram += normed.mT @ normed
        cross += (batch @ layer.latent.mT).mT @ normed
    energy = gram.diagonal().clamp_min(torch.finfo(torch.float32).tiny)
    # The weight brings each number back to its size; the anchor stays as it is, about 1.
    weight = torch.cat([cross.diagonal() / energy[:-1], energy.new_ones(1)])
    weight = torch.where(weight > 0, weight, 1.0)
    gram, cross = gram * weight * weight.unsqueeze(-1), cross * weight
    gram.diagonal().add_(_RIDGE * gram.diagonal() + torch.finfo(torch.float32).tiny)
    old = torch.linalg.solve(gram, cross.mT).mT.to(rows)
    return replace(one, latent_norm=weight.to(rows), key_up=layer.key_up @ old, value_up=layer.value_up @ old)


def _near_constant(batches: list[Float[Tensor, "_ hidden"]]) -> Float64[Tensor, " hidden"]:
    """Return u with u·x near 1: the least squares solution C⁻¹ μ."""
    hidden = batches[0].shape[1]
    moment, total = batches[0].new_zeros(hidden, hidden).double(), batches[0].new_zeros(hidden).double()
    for batch in batches:
        moment += batch.mT @ batch
        total += batch.sum(0)
    moment.diagonal().add_(_RIDGE * moment.diagonal().mean() + torch.finfo(torch.float32).tiny)
    return torch.linalg.solve(moment, total)
