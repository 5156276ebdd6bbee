"""The published TransMLA method (arXiv:2502.07864), the baseline: written from the paper's description.

RoRoPE with FreqFold, rotation stripped, balanced joint PCA; see docs/concepts/algorithm.md, "The published method
(RoRoPE)".
"""

from collections.abc import Sequence

import torch
from jaxtyping import Complex, Float64
from torch import Tensor

from transmla.calibration.moments import AttentionWeights, Moments
from transmla.convert.latent_attention import LatentAttention
from transmla.convert.methods.base import ConvertedLayer, LayerGoal, Method
from transmla.convert.methods.steps import in_float64, pair_covariance, rotary_queries
from transmla.linalg.hermitian import sqrt_psd
from transmla.linalg.low_rank import low_rank
from transmla.linalg.mixing import RotarySplit, mix_heads
from transmla.linalg.rotary import from_pairs, interleave, to_pairs

# The method has no rule for the fold but trying on the test text; this is what its authors use most.
_USUAL_FOLD = 4


class RoRoPE(Method):
    """Real PCA per frequency, calibrated on the source's own activations."""

    name = "rorope"
    title = "RoRoPE"
    reference = "arXiv:2502.07864"
    rope_types = frozenset({"default"})
    takes_freq_fold = True

    def choose_folds(self, folds: Sequence[int]) -> tuple[int, ...]:
        """Return the one that is nearest to what the method's authors use."""
        return (min(folds, key=lambda fold: abs(fold - _USUAL_FOLD)),)

    def convert(self, weights: AttentionWeights, moments: Moments | None, goal: LayerGoal) -> ConvertedLayer:
        """Convert as TransMLA does; there must be one fold only."""
        assert moments is not None
        [fold] = goal.folds
        weights = in_float64(weights)
        key = to_pairs(weights.key)
        kv_heads, pairs, _ = key.shape
        plain = torch.eye(pairs).to(key).expand(kv_heads, pairs, pairs)
        # A rotation mixes the real and the imaginary parts alike, so only the real part of the covariance counts.
        covariance = pair_covariance(key, moments.uniform).real.to(key.dtype)
        split = mix_heads(covariance, metric=plain, num_slots=len(goal.slot_frequencies), fold=fold)
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
            rank=goal.kv_lora_rank,
        )
        return ConvertedLayer(attention, fold)


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
        query_rope=rotary_queries(to_pairs(weights.query), split),
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


def _energy(rows: Float64[Tensor, "kv_heads head_dim hidden"], moment: Float64[Tensor, "hidden hidden"]) -> Tensor:
    return (rows @ moment * rows).sum()
