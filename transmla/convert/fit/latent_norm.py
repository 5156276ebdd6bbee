"""A latent norm that is really one (``--latent-norm fitted``): :mod:`transmla.linalg.latent_norm`, fitted to a layer.

The rows are of ordinary size, so that blocks of 8 bits hold them, and no eps matters.
"""

from dataclasses import replace

import torch
from jaxtyping import Float64
from torch import Tensor

from transmla.convert.fit.targets import LayerTargets
from transmla.convert.latent_attention import LatentAttention
from transmla.linalg.latent_norm import anchored, norm_and_readout, unit_size
from transmla.linalg.near_constant import near_constant


@torch.no_grad()
def fitted_norm(
    layer: LatentAttention, targets: LayerTargets, moment: Float64[Tensor, "hidden hidden"], *, batch_size: int
) -> LatentAttention:
    """Return a layer with one more number in its latent, and a norm on all of them.

    Args:
        layer: factors without a norm.
        targets: windows to fit on.
        moment: E[x xᵀ] of its inputs.
        batch_size: windows at once.
    """
    batches = [batch.inputs.flatten(0, 1) for batch in targets.batches(batch_size)]
    anchor = near_constant(moment, targets.inputs.flatten(0, 1).mean(0)).to(layer.latent)
    longest = max((batch @ layer.latent.mT).square().sum(-1).max() for batch in batches)
    rows = anchored(layer.latent, anchor, longest)
    rank = len(layer.latent)
    gram, cross = rows.new_zeros(rank + 1, rank + 1).double(), rows.new_zeros(rank, rank + 1).double()
    for batch in batches:
        normed = unit_size(batch @ rows.mT)
        gram += normed.mT @ normed
        cross += (batch @ layer.latent.mT).mT @ normed
    weight, old = norm_and_readout(gram, cross)
    old = old.to(rows)
    return replace(
        layer,
        latent=rows,
        latent_norm=weight.to(rows),
        key_up=layer.key_up @ old,
        value_up=layer.value_up @ old,
    )
