"""Which combinations of all heads' keys the shared rotary slots carry.

See docs/concepts/algorithm.md, "Slots and latent from eigenvectors".

Stack the rotary pairs of all key/value heads: ``z ∈ C^(kv_heads·pair)``. At one frequency heads may be mixed by any
complex-linear map, because it commutes with the rotation. So pairs of equal (or, folded, of neighboring) frequency
form a group, and the slots of the group carry the combinations that hold most of it:

    κ = down z,        z = up κ + remainder

With as many slots as components nothing remains and the split is exact at fold 1. RoRoPE (TransMLA, arXiv:2502.07864)
is the special case of real combinations, FreqFold that of groups of several frequencies.
"""

from typing import NamedTuple

import torch
from einops import rearrange
from jaxtyping import Complex, Float
from torch import Tensor

from transmla.linalg.hermitian import sqrt_psd
from transmla.linalg.low_rank import low_rank
from transmla.linalg.rotary import expected_rotation


class RotarySplit(NamedTuple):
    """What the slots carry, ``κ = down z``, and what they give back, ``z ≈ up κ``."""

    down: Complex[Tensor, "slot kv_heads pair"]
    up: Complex[Tensor, "kv_heads pair slot"]


def mix_heads(
    covariance: Complex[Tensor, "kv_heads pair kv_heads pair"],
    *,
    metric: Complex[Tensor, "kv_heads pair pair"],
    num_slots: int,
    fold: int,
) -> RotarySplit:
    """Choose the slots of each group of ``fold`` neighboring frequencies.

    Args:
        covariance: E[z zᴴ] of the keys.
        metric: cost of an error in the keys of one head, E[q qᴴ] summed over the queries that see it.
        num_slots: slots in all; each group gets ``num_slots * fold / pair`` of them, a whole number.
        fold: frequencies in a group; 1 keeps every slot at the frequency of its pairs.
    """
    kv_heads, pairs = covariance.shape[:2]
    share, remainder = divmod(num_slots * fold, pairs)
    assert remainder == 0, f"{num_slots} slots cannot be shared out among groups of {fold} of {pairs} pairs"
    down = covariance.new_zeros(num_slots, kv_heads, pairs)
    up = covariance.new_zeros(kv_heads, pairs, num_slots)
    for group in range(pairs // fold):
        pair, slot = slice(group * fold, (group + 1) * fold), slice(group * share, (group + 1) * share)
        keys = rearrange(covariance[:, pair, :, pair], "g l h m -> (g l) (h m)")
        root = torch.block_diag(*sqrt_psd(metric[:, pair, pair]))
        factors = low_rank(torch.eye(len(keys)).to(keys), moment=keys, metric_root=root, rank=share)
        up[:, pair, slot] = rearrange(factors.up, "(g l) s -> g l s", g=kv_heads)
        down[slot, :, pair] = rearrange(factors.down, "s (g l) -> s g l", g=kv_heads)
    return RotarySplit(down, up)


def rotation_error(
    split: RotarySplit,
    covariance: Complex[Tensor, "kv_heads pair kv_heads pair"],
    query_moment: Complex[Tensor, "heads pair pair"],
    *,
    distances: Float[Tensor, "heads distance"],
    pair_frequencies: Float[Tensor, " pair"],
    slot_frequencies: Float[Tensor, " slot"],
) -> Float[Tensor, ""]:
    """Predict the mean squared logit error of a split, before any rank is cut.

    The error is a sum of parts Re Q_p·conj(K_p)·exp(iω_pΔ): the source's pairs at their own frequencies, less the slots
    at theirs, less what remains, which stands still and is met by the average rotation ρ of its pair. For queries and
    keys that are independent and of every phase alike, and distances as given, that of head h is exactly

        ½ Re Σ_pr E[Q_p Q̄_r] · E[K̄_p K_r] · E_Δ[exp(i(ω_p − ω_r)Δ)].

    The logits are not scaled, and ``query_moment`` may carry a weight for each head.
    """
    kv_heads, pairs = covariance.shape[:2]
    groups = len(query_moment) // kv_heads
    average = expected_rotation(distances, pair_frequencies)
    frequencies = torch.cat([pair_frequencies, slot_frequencies, torch.zeros_like(pair_frequencies)]).to(distances)
    angle = frequencies.unsqueeze(-1) * torch.arange(distances.shape[-1]).to(frequencies)
    turns = torch.polar(torch.ones_like(angle), angle)

    keys = covariance.flatten(2).flatten(0, 1)
    everything, down = torch.eye(len(keys)).to(keys), split.down.flatten(1)
    remainder = everything - split.up.flatten(0, 1) @ down
    error = distances.new_zeros(())
    for head, moment in enumerate(query_moment):
        group = head // groups
        own = slice(group * pairs, (group + 1) * pairs)
        key_parts = torch.cat([everything[own], down, remainder[own]])
        query_parts = torch.cat([torch.eye(pairs).to(moment), -split.up[group].mH, -torch.diag(average[head])])
        together = (query_parts @ moment @ query_parts.mH) * (key_parts @ keys @ key_parts.mH).conj()
        error += (together * ((turns * distances[head]) @ turns.mH)).sum().real / 2
    # Parts that cancel leave rounding of either sign.
    return error.clamp_min(0)


def identity_split(kv_heads: int, pairs: int, *, like: Tensor) -> RotarySplit:
    """Give every pair of every head a slot of its own: nothing remains, nothing is lost."""
    eye = torch.eye(kv_heads * pairs).to(like)
    return RotarySplit(eye.unflatten(1, (kv_heads, pairs)), eye.unflatten(0, (kv_heads, pairs)))
