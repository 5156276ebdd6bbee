"""What becomes of the queries after a method has converted a layer: one projection that all heads share."""

from dataclasses import replace

import torch

from transmla.calibration.moments import Moments
from transmla.convert.latent_attention import LatentAttention
from transmla.linalg.hermitian import sqrt_psd
from transmla.linalg.low_rank import low_rank, pad


def compress_queries(layer: LatentAttention, moments: Moments, *, rank: int) -> LatentAttention:
    """Send the queries through ``rank`` numbers, at the least cost in the logits (``q_lora_rank``)."""
    latent_moment = layer.latent @ moments.attended @ layer.latent.mT
    nope = layer.key_up @ latent_moment @ layer.key_up.mT
    # Averaged over the rotation a slot costs the same in both of its directions.
    slots = (layer.key_rope @ moments.attended * layer.key_rope).sum(-1).unflatten(0, (-1, 2)).mean(-1)
    rope = torch.diag(slots.repeat_interleave(2)).expand(len(nope), -1, -1)
    roots = [
        torch.block_diag(sqrt_psd(n), sqrt_psd(r)) * spread.sqrt()
        for n, r, spread in zip(nope, rope, moments.spread, strict=True)
    ]
    heads, width, _ = layer.query.shape
    factors = low_rank(
        layer.query.flatten(0, 1), moment=moments.uniform, metric_root=torch.block_diag(*roots), rank=rank
    )
    up = factors.up.unflatten(0, (heads, width))
    split = layer.query_nope.shape[1]
    return replace(layer, query_nope=up[:, :split], query_rope=up[:, split:], query_down=factors.down)


def split_queries(layer: LatentAttention, *, head_dim: int) -> LatentAttention:
    """Write the same queries as one projection for all heads and one map a head: only the first can have biases.

    Nothing is lost, for the source's queries have ``head_dim`` numbers a head.
    """
    heads = len(layer.query)
    up, size, down = torch.linalg.svd(layer.query, full_matrices=False)
    up, down = up[..., :head_dim], (size.unsqueeze(-1) * down)[:, :head_dim]
    # A head with fewer numbers than the source's has nothing to put into the rest.
    up, down = pad(up, 2, head_dim), pad(down, 1, head_dim)
    own = torch.eye(heads).to(up)
    query = torch.einsum("hwd,hg->hwgd", up, own).flatten(2)
    split = layer.query_nope.shape[1]
    return replace(layer, query_nope=query[:, :split], query_rope=query[:, split:], query_down=down.flatten(0, 1))
