"""One attention layer, from grouped queries to a latent: pure functions of weights, moments and sizes.

Three methods share the same steps, split the rotation, take the joint latent of what remains, put the heads together:

- ``complex``: docs/concepts/algorithm.md, "Slots and latent from eigenvectors", then docs/concepts/algorithm.md,
  "Variable projection";
- ``rorope``: the published TransMLA method, the baseline (docs/concepts/algorithm.md, "The published method (RoRoPE)");
- ``exact``: no approximation at all, at the source's cache size (docs/concepts/algorithm.md, "Exact conversion").
"""

from dataclasses import dataclass, replace

import torch
from einops import rearrange
from jaxtyping import Complex, Float, Float64
from torch import Tensor

from transmla.calibration.moments import AttentionWeights, Moments
from transmla.convert.latent_attention import LatentAttention
from transmla.linalg.hermitian import sqrt_psd
from transmla.linalg.low_rank import low_rank, pad
from transmla.linalg.mixing import RotarySplit, identity_split, mix_heads, rotation_error
from transmla.linalg.rotary import as_real, expected_rotation, from_pairs, interleave, long_tail, to_pairs
from transmla.linalg.variable_projection import CacheProblem

# Steps of L-BFGS from the eigenvectors to the least predicted cost, and what distances beyond the windows count.
REFINE_STEPS = 12
_TAIL = 0.03


@dataclass(frozen=True, eq=False)
class Target:
    """What one layer is converted to.

    Attributes:
        kv_lora_rank: numbers of the latent.
        slot_frequencies: frequency of each rotary slot, in radians per token.
        pair_frequencies: frequency of each rotary pair of the source.
        folds: how many neighbouring frequencies may share slots, to start from.
        context: longest distance, in tokens, at which a query may meet a key.
        refine_steps: steps from the closed form towards the least predicted cost.
        ridge: see :class:`CacheProblem`.
    """

    kv_lora_rank: int
    slot_frequencies: Float[Tensor, " slot"]
    pair_frequencies: Float[Tensor, " pair"]
    folds: tuple[int, ...]
    context: int
    refine_steps: int = REFINE_STEPS
    ridge: float = 1e-5


def complex_layer(weights: AttentionWeights, moments: Moments, target: Target) -> tuple[LatentAttention, int]:
    """Choose what the cache holds, and how every head reads it, by what an error would do to the layer's output.

    The functionals start from complex mixing of the heads and the joint latent of what remains
    (docs/concepts/algorithm.md, "Slots and latent from eigenvectors"). From there all of them move together to the
    least predicted cost, and each head's maps are the regression on them (docs/concepts/algorithm.md, "Variable
    projection"), see :mod:`transmla.linalg.variable_projection`.

    Returns:
        The layer, and the fold at which it started.
    """
    weights = _double(weights)
    problem = _cache_problem(weights, moments, target)
    start, fold = _start(weights, moments, target)
    functionals = problem.refine(start, steps=target.refine_steps)
    maps = problem.maps(functionals)
    slots, latent = (functionals @ weights.joint).tensor_split([problem.rope])
    query = interleave(to_pairs(weights.query))
    return LatentAttention(
        query_nope=query,
        query_rope=maps.slots.mT @ query,
        latent=latent,
        key_rope=slots,
        key_up=maps.key_up,
        value_up=maps.value_up,
        output=weights.output,
        output_bias=weights.output_bias,
        softmax_scale=weights.key.shape[1] ** -0.5,
    ), fold


def predicted_cost(weights: AttentionWeights, moments: Moments, target: Target) -> float:
    """Predict the squared error of the output of :func:`complex_layer`'s layer, per token, without making it."""
    weights = _double(weights)
    problem = _cache_problem(weights, moments, target)
    start, _ = _start(weights, moments, target)
    return problem.cost(problem.refine(start, steps=target.refine_steps)).item()


def _cache_problem(weights: AttentionWeights, moments: Moments, target: Target) -> CacheProblem:
    distances, deltas = long_tail(moments.distances, context=target.context, share=_TAIL)
    return CacheProblem(
        keys=moments.keys,
        values=moments.values,
        queries=moments.queries / weights.key.shape[1],
        output_gram=weights.output_gram,
        distances=distances,
        deltas=deltas,
        pair_frequencies=target.pair_frequencies,
        slot_frequencies=target.slot_frequencies,
        ridge=target.ridge,
    )


def _start(weights: AttentionWeights, moments: Moments, target: Target) -> tuple[Float64[Tensor, "cached joint"], int]:
    """Return functionals of the stacked keys and values from eigenvectors alone, and the best fold."""
    query, key = to_pairs(weights.query), to_pairs(weights.key)
    kv_heads = len(key)
    covariance = _covariance(key, moments.attended)
    # An error in a logit of head h costs spread_h at the layer's output.
    query_moment = (query @ moments.uniform.to(query.dtype) @ query.mH) * moments.spread[:, None, None]
    metric = _per_group(query_moment, kv_heads)
    splits = {
        fold: mix_heads(covariance, metric=metric, num_slots=len(target.slot_frequencies), fold=fold)
        for fold in target.folds
    }
    fold = min(
        splits,
        key=lambda fold: rotation_error(
            splits[fold],
            covariance,
            query_moment,
            distances=moments.distances,
            pair_frequencies=target.pair_frequencies,
            slot_frequencies=target.slot_frequencies,
        ).item(),
    )
    slots = as_real(splits[fold].down.flatten(1))
    rest = torch.eye(slots.shape[1]).to(slots) - as_real(splits[fold].up.flatten(0, 1)) @ slots
    # Without its slot a pair still turns by ρ on average; the queries take that with them.
    rotation = expected_rotation(moments.distances, target.pair_frequencies)
    rested = interleave(rotation.unsqueeze(-1) * query)
    key_metric = rested @ moments.uniform @ rested.mT * (moments.spread / weights.key.shape[1])[:, None, None]
    value_metric = weights.output_gram * moments.mass[:, None, None]
    root = torch.block_diag(*sqrt_psd(_per_group(key_metric, kv_heads)), *sqrt_psd(_per_group(value_metric, kv_heads)))
    joint = torch.block_diag(rest, torch.eye(slots.shape[1]).to(slots))
    moment = weights.joint @ moments.attended @ weights.joint.T
    # A latent as large as all keys and values holds them all; an engine that wants more of it gets zeros.
    rank = min(target.kv_lora_rank, len(joint))
    latent = low_rank(joint, moment=moment, metric_root=root, rank=rank).down
    return torch.cat([pad(slots, 1, joint.shape[1]), latent]), fold


def rorope_layer(weights: AttentionWeights, moments: Moments, target: Target) -> tuple[LatentAttention, int]:
    """Convert as TransMLA does (arXiv:2502.07864): RoRoPE with FreqFold, rotation stripped, balanced joint PCA.

    Returns:
        The layer, and its fold: the method has no rule for it, so there must be one only.
    """
    [fold] = target.folds
    weights = _double(weights)
    key = to_pairs(weights.key)
    kv_heads, pairs, _ = key.shape
    plain = torch.eye(pairs).to(key).expand(kv_heads, pairs, pairs)
    # A rotation mixes the real and the imaginary parts alike, so only the real part of the covariance counts.
    covariance = _covariance(key, moments.uniform).real.to(key.dtype)
    split = mix_heads(covariance, metric=plain, num_slots=len(target.slot_frequencies), fold=fold)
    _, rest = _split_keys(key, split)
    # Keys are scaled to the energy of the values, so that the joint PCA does not prefer the larger of the two. What
    # remains of them at rounding level is nothing, and scaled up it would take the place of values.
    least = torch.finfo(torch.float64).eps * _energy(weights.key, moments.uniform)
    remaining = _energy(from_pairs(rest), moments.uniform).maximum(least).clamp_min(1e-30)
    balance = _energy(weights.value, moments.uniform) / remaining
    identity = torch.eye(weights.key.shape[1]).to(weights.key).expand(kv_heads, -1, -1)
    attention = _assemble(
        weights,
        split,
        moment=moments.uniform,
        key_metric=identity * balance,
        value_metric=identity,
        rank=target.kv_lora_rank,
    )
    return attention, fold


def exact_layer(weights: AttentionWeights) -> LatentAttention:
    """Write the same attention as MLA: every key pair in a slot of its own, every value latent.

    See docs/concepts/algorithm.md, "Exact conversion".
    """
    kv_heads, head_dim, _ = weights.key.shape
    heads = len(weights.query)
    key = to_pairs(weights.key)
    split = identity_split(kv_heads, head_dim // 2, like=key)
    select = torch.eye(kv_heads * head_dim).to(weights.value).unflatten(0, (kv_heads, head_dim))
    return LatentAttention(
        query_nope=weights.query[:, :0],
        query_rope=_rotary_queries(to_pairs(weights.query), split),
        latent=weights.value.flatten(0, 1),
        key_rope=interleave(key.flatten(0, 1)),
        key_up=weights.query.new_zeros(heads, 0, kv_heads * head_dim),
        value_up=select.repeat_interleave(heads // kv_heads, dim=0),
        output=weights.output,
        output_bias=weights.output_bias,
        softmax_scale=head_dim**-0.5,
    )


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


def _assemble(
    weights: AttentionWeights,
    split: RotarySplit,
    *,
    moment: Float64[Tensor, "hidden hidden"],
    key_metric: Float64[Tensor, "kv_heads head_dim head_dim"],
    value_metric: Float64[Tensor, "kv_heads head_dim head_dim"],
    rank: int,
) -> LatentAttention:
    """Return the joint latent of remaining keys and values, and every head's way to it.

    Args:
        weights: the source layer.
        split: what the rotary slots carry.
        moment: second moment of the tokens that are attended.
        key_metric, value_metric: cost of an error in one head's remaining keys, and in its values.
        rank: numbers of the latent.
    """
    kv_heads, head_dim, _ = weights.key.shape
    groups = len(weights.query) // kv_heads
    slots, rest = _split_keys(to_pairs(weights.key), split)
    joint = torch.cat([from_pairs(rest), weights.value]).flatten(0, 1)
    root = torch.block_diag(*sqrt_psd(key_metric), *sqrt_psd(value_metric))
    factors = low_rank(joint, moment=moment, metric_root=root, rank=rank)
    key_up, value_up = factors.up.unflatten(0, (2 * kv_heads, head_dim)).split(kv_heads)
    key_up = key_up.repeat_interleave(groups, dim=0)
    return LatentAttention(
        query_nope=weights.query,
        query_rope=_rotary_queries(to_pairs(weights.query), split),
        latent=factors.down,
        key_rope=interleave(slots),
        key_up=key_up,
        value_up=value_up.repeat_interleave(groups, dim=0),
        output=weights.output,
        output_bias=weights.output_bias,
        softmax_scale=head_dim**-0.5,
    )


def _split_keys(
    key: Complex[Tensor, "kv_heads pair hidden"], split: RotarySplit
) -> tuple[Complex[Tensor, "slot hidden"], Complex[Tensor, "kv_heads pair hidden"]]:
    """Return what the slots carry, and the keys that remain without rotation."""
    slots = torch.einsum("sgl,glh->sh", split.down, key)
    return slots, key - split.up @ slots


def _rotary_queries(
    query: Complex[Tensor, "heads pair hidden"], split: RotarySplit
) -> Float[Tensor, "heads rope hidden"]:
    """Return each head's queries to the slots: q·conj(up κ) = (upᴴ q)·conj(κ)."""
    up = split.up.repeat_interleave(len(query) // len(split.up), dim=0)
    return interleave(up.mH @ query)


def _covariance(
    key: Complex[Tensor, "kv_heads pair hidden"], moment: Float64[Tensor, "hidden hidden"]
) -> Complex[Tensor, "kv_heads pair kv_heads pair"]:
    kv_heads, pairs, _ = key.shape
    stacked = key.flatten(0, 1)
    return (stacked @ moment.to(key.dtype) @ stacked.mH).reshape(kv_heads, pairs, kv_heads, pairs)


def _per_group(per_head: Tensor, kv_heads: int) -> Tensor:
    """Add up the query heads that share a key/value head."""
    return rearrange(per_head, "(g q) a b -> g q a b", g=kv_heads).sum(1)


def _energy(rows: Float64[Tensor, "kv_heads head_dim hidden"], moment: Float64[Tensor, "hidden hidden"]) -> Tensor:
    return (rows @ moment * rows).sum()


def _double(weights: AttentionWeights) -> AttentionWeights:
    bias = weights.output_bias
    return AttentionWeights(
        weights.query.double(),
        weights.key.double(),
        weights.value.double(),
        weights.output.double(),
        None if bias is None else bias.double(),
    )
