"""What attention does with its tokens, as sums over a batch of windows.

With p_h(i, j) the attention probability, an error δ in one value moves head h's output by p·δ, and an error δ in one
logit moves it by about p·δ·(v_j − o_i). Errors at different keys are nearly independent, so what counts is *squared*:
p² decides how much a token matters as a value, p²·‖W_O^h (v_j − o_i)‖² what an error in its logit costs at the layer's
output (docs/concepts/algorithm.md, "Moments"). The second forgives the attention sink: its logit is large, but its
value is what the head puts out anyway.
"""

from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor


class AttentionSums(NamedTuple):
    """Sums over the queries i and keys j of a batch; *cost* is p² ‖W_O^h (v_j − o_i)‖².

    Attributes:
        token: Σ p² over heads and queries, for each key.
        mass: Σ p² over queries and keys, for each head.
        cost: Σ cost over all pairs at distance Δ = i − j, for each head.
        key_cost: Σ cost over queries, for each key.
        query_cost: Σ cost over keys, for each query.
        pooled: Σ_j p_ij y_j of every ``stride``-th query.
    """

    token: Float[Tensor, "batch tokens"]
    mass: Float[Tensor, " heads"]
    cost: Float[Tensor, "heads tokens"]
    key_cost: Float[Tensor, "batch heads tokens"]
    query_cost: Float[Tensor, "batch heads tokens"]
    pooled: Float[Tensor, "batch heads some_tokens joint"]


def attention_sums(
    query: Float[Tensor, "batch heads tokens head_dim"],
    key: Float[Tensor, "batch heads tokens head_dim"],
    value: Float[Tensor, "batch heads tokens head_dim"],
    output_gram: Float[Tensor, "heads head_dim head_dim"],
    joint: Float[Tensor, "batch tokens joint"],
    *,
    scale: float,
    stride: int,
) -> AttentionSums:
    """Run causal attention and sum what :class:`AttentionSums` names.

    Args:
        query: rotated queries.
        key: rotated keys, repeated for the heads of a group.
        value: values, repeated likewise.
        output_gram: W_O^hᵀ W_O^h of each head.
        joint: what is pooled, y.
        scale: factor on the logits before the softmax.
        stride: pool for one query in so many; neighbors attend alike.
    """
    # The mask enters as the matrix to which the product is added, and ‖W_O (v_j − o_i)‖² = vᵀAv + oᵀAo − 2 oᵀAv (A the
    # Gram matrix) is one product of longer vectors: what costs here is not the arithmetic but each pass over i × j.
    tokens = query.shape[-2]
    mask = query.new_full((tokens, tokens), float("-inf")).triu_(1).expand(query.shape[0] * query.shape[1], -1, -1)
    logits = torch.baddbmm(mask, (query * scale).flatten(0, 1), key.flatten(0, 1).mT)
    probability = logits.softmax(dim=-1).unflatten(0, query.shape[:2])
    output = probability @ value
    some = probability[:, :, stride // 2 :: stride]
    # One product a window: a product a head would copy the window for each of them.
    pooled = (some.flatten(1, 2) @ joint).unflatten(1, some.shape[1:3])
    squared = probability.square_()

    moved = output @ output_gram
    output_length = (moved * output).sum(-1, keepdim=True)
    value_length = ((value @ output_gram) * value).sum(-1, keepdim=True)
    one = torch.ones_like(value_length)
    by_query = torch.cat([-2 * moved, output_length, one], dim=-1)
    by_key = torch.cat([value, one, value_length], dim=-1)
    # Rounding may take a cost below zero.
    cost = (by_query @ by_key.mT).mul_(squared).clamp_min_(0)
    by_token = squared.sum(-2)
    return AttentionSums(
        token=by_token.sum(1),
        mass=by_token.sum((0, 2)),
        cost=diagonal_sums(cost.sum(0)),
        key_cost=cost.sum(-2),
        query_cost=cost.sum(-1),
        pooled=pooled,
    )


def diagonal_sums(matrix: Float[Tensor, "heads tokens tokens"]) -> Float[Tensor, "heads tokens"]:
    """Sum each lower diagonal: entry Δ is Σ_i matrix[i, i − Δ]."""
    tokens = matrix.shape[-1]
    # Rows padded to 2·tokens and re-cut to 2·tokens − 1 shift row i by i places: diagonals become columns.
    padded = torch.nn.functional.pad(matrix.flip(-1), (0, tokens)).flatten(-2)[..., :-tokens]
    return padded.unflatten(-1, (tokens, 2 * tokens - 1)).sum(-2)[..., tokens - 1 :]
