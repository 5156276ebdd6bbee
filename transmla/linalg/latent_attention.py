"""Attention on a cached latent, without expanding what is cached.

Head h's key for token j is (U_h c_j, k_j) and its value V_h c_j, where the latent c_j and the rotated key k_j are all
that is cached, the same for every head. Products may be taken in either order:

    logit_ij = scale · (q_iᵀ U_h c_j + r_iᵀ k_j) = scale · ((U_hᵀ q_i)ᵀ c_j + r_iᵀ k_j)
    output_i = Σ_j p_ij V_h c_j                  = V_h (Σ_j p_ij c_j)

The left side expands every cached token for every head, at each step again; the right side takes queries into the
latent space and brings the pooled latents back (DeepSeek-V2, arXiv:2405.04434, section 2.1.2). It is exact, and in it
all heads share one key and one value: heads and queries are rows of one matrix, and the cache is read as it lies. The
logits are a sum of two products, for joining latent and rotated key would copy the whole cache at every step.

Products and a softmax it is, and no fused kernel: for a few rows that of a CPU takes twice as long (8192 tokens), and
those for GPUs find too few rows to share out, or do not take keys of 576 and values of 512.
"""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float
from torch import Tensor

CPU_CHUNK_NUMBERS, CHUNK_NUMBERS = 2**21, 2**26
"""Logits that may exist at once: 8 MB in float32, near a CPU's caches, or 256 MB, which keep a GPU busy."""


def absorbing_is_cheaper(*, queries: int, tokens: int, rank: int, nope: int, rope: int, value: int) -> bool:
    """Compare the multiplications of both forms, for each head, when ``queries`` attend to ``tokens``."""
    expanded = tokens * rank * (nope + value) + queries * tokens * (nope + rope + value)
    absorbed = queries * rank * (nope + value) + queries * tokens * ((rank if nope else 0) + rope + rank)
    return absorbed < expanded


def latent_attention(
    query_nope: Float[Tensor, "batch heads queries nope"],
    query_rope: Float[Tensor, "batch heads queries rope"],
    latent: Float[Tensor, "batch tokens rank"],
    key_rope: Float[Tensor, "batch tokens rope"],
    up_key: Float[Tensor, "heads nope rank"],
    up_value: Float[Tensor, "heads value rank"],
    mask: Bool[Tensor, "#batch #heads #queries tokens"] | Float[Tensor, "#batch #heads #queries tokens"] | None,
    *,
    scale: float,
    keep_weights: bool = False,
    chunk: int | None = None,
) -> tuple[Float[Tensor, "batch queries heads value"], Float[Tensor, "batch heads queries tokens"] | None]:
    """Attend to latents; return the heads' outputs and, with ``keep_weights``, the attention weights.

    Args:
        query_nope: the part of the queries that is not rotated.
        query_rope: the rotated part.
        latent: c, normalized.
        key_rope: k, rotated.
        up_key: U.
        up_value: V.
        mask: true, or what is added to the logits, where a query may attend; ``None`` if all may everywhere.
        scale: factor on the logits before the softmax.
        keep_weights: whether all weights are returned, which takes the memory that chunks save.
        chunk: queries that have their logits at once; by default as many as the device can well have.
    """
    batch, heads, queries, nope = query_nope.shape
    query_latent = torch.einsum("bhqn,hnr->bhqr", query_nope, up_key) if nope else None
    if chunk is None:
        numbers = CPU_CHUNK_NUMBERS if latent.device.type == "cpu" else CHUNK_NUMBERS
        chunk = max(1, numbers // (batch * heads * latent.shape[1]))
    pooled, kept = [], []
    for start in range(0, queries, chunk):
        some = slice(start, start + chunk)
        logits = _logits(
            None if query_latent is None else query_latent[:, :, some], query_rope[:, :, some], latent, key_rope, scale
        )
        if mask is not None:
            logits = _masked(logits, mask if mask.shape[2] == 1 else mask[:, :, some])
        weights = logits.softmax(-1, dtype=torch.promote_types(logits.dtype, torch.float32)).to(query_rope.dtype)
        pooled.append((weights.flatten(1, 2) @ latent).unflatten(1, weights.shape[1:3]))
        if keep_weights:
            kept.append(weights)
    output = torch.einsum("bhqr,hvr->bqhv", _joined(pooled), up_value)
    return output, _joined(kept) if keep_weights else None


def _logits(
    query_latent: Float[Tensor, "batch heads queries rank"] | None,
    query_rope: Float[Tensor, "batch heads queries rope"],
    latent: Float[Tensor, "batch tokens rank"],
    key_rope: Float[Tensor, "batch tokens rope"],
    scale: float,
) -> Float[Tensor, "batch heads queries tokens"]:
    # Added to nothing: in bfloat16 a CPU takes three times as long for the same product by another name.
    logits = torch.baddbmm(query_rope.new_zeros(()), query_rope.flatten(1, 2), key_rope.mT, beta=0, alpha=scale)
    if query_latent is not None:
        logits = torch.baddbmm(logits, query_latent.flatten(1, 2), latent.mT, alpha=scale)
    return logits.unflatten(1, query_rope.shape[1:3])


def _masked(logits: Float[Tensor, "batch heads queries tokens"], mask: Tensor) -> Tensor:
    if mask.dtype != torch.bool:
        return logits + mask
    # Not minus infinity: a padded query may attend to nothing at all, and its NaN would come back in every layer above.
    return logits.masked_fill(~mask, torch.finfo(logits.dtype).min)


def _joined(parts: list[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=2)
