"""Steps that several methods have in common."""

from einops import rearrange
from jaxtyping import Complex, Float, Float64
from torch import Tensor

from transmla.calibration.moments import AttentionWeights
from transmla.linalg.mixing import RotarySplit
from transmla.linalg.rotary import interleave


def pair_covariance(
    key: Complex[Tensor, "kv_heads pair hidden"], moment: Float64[Tensor, "hidden hidden"]
) -> Complex[Tensor, "kv_heads pair kv_heads pair"]:
    """Return the covariance of all heads' rotary pairs, for tokens of a second moment."""
    kv_heads, pairs, _ = key.shape
    stacked = key.flatten(0, 1)
    return (stacked @ moment.to(key.dtype) @ stacked.mH).reshape(kv_heads, pairs, kv_heads, pairs)


def per_group(per_head: Tensor, kv_heads: int) -> Tensor:
    """Add up the query heads that share a key/value head."""
    return rearrange(per_head, "(g q) a b -> g q a b", g=kv_heads).sum(1)


def in_float64(weights: AttentionWeights) -> AttentionWeights:
    """Return the weights in float64."""
    bias = weights.output_bias
    return AttentionWeights(
        weights.query.double(),
        weights.key.double(),
        weights.value.double(),
        weights.output.double(),
        None if bias is None else bias.double(),
    )


def rotary_queries(
    query: Complex[Tensor, "heads pair hidden"], split: RotarySplit
) -> Float[Tensor, "heads rope hidden"]:
    """Return each head's queries to the slots: q·conj(up κ) = (upᴴ q)·conj(κ)."""
    up = split.up.repeat_interleave(len(query) // len(split.up), dim=0)
    return interleave(up.mH @ query)
