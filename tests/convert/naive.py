"""Attention written down once more, as the formulas say it, with nothing shared with the package.

Frequencies are radians per token; positions count from zero. Everything runs in the type of its inputs.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def softmax_rows(logits: list[list[float]]) -> list[list[float]]:
    rows = []
    for row in logits:
        weights = [math.exp(value - max(row)) for value in row]
        rows.append([weight / sum(weights) for weight in weights])
    return rows


def turn(pairs: Tensor, frequencies: Tensor, position: int) -> Tensor:
    """Multiply complex pairs by exp(i·frequency·position)."""
    return pairs * torch.polar(torch.ones_like(frequencies), frequencies * position)


def source_logits(weights, x: Tensor, frequencies: Tensor) -> list[list[list[float]]]:
    """Return the causal logits of grouped-query attention, head by head, query by query, key by key."""
    heads, head_dim, _ = weights.query.shape
    groups = heads // len(weights.key)

    def pairs(projection: Tensor, token: Tensor) -> Tensor:
        vector = projection @ token
        return torch.complex(vector[: head_dim // 2], vector[head_dim // 2 :])

    logits = []
    for head in range(heads):
        logits.append([])
        for i in range(len(x)):
            query = turn(pairs(weights.query[head], x[i]), frequencies, i)
            row = []
            for j in range(i + 1):
                key = turn(pairs(weights.key[head // groups], x[j]), frequencies, j)
                row.append((query * key.conj()).sum().real.item() / math.sqrt(head_dim))
            logits[-1].append(row)
    return logits


def source_attention(weights, x: Tensor, frequencies: Tensor) -> Tensor:
    """Return the output of grouped-query attention."""
    groups = len(weights.query) // len(weights.key)
    output = torch.zeros_like(x)
    for head, logits in enumerate(source_logits(weights, x, frequencies)):
        for i, row in enumerate(softmax_rows(logits)):
            for j, probability in enumerate(row):
                output[i] += weights.output[head] @ (weights.value[head // groups] @ x[j]) * probability
    return output


def cached_latent(layer, x: Tensor) -> Tensor:
    latent = x @ layer.latent.T
    return latent if layer.latent_norm is None else rms_norm(latent, layer.latent_norm, 1e-6)


def latent_logits(layer, x: Tensor, frequencies: Tensor) -> list[list[list[float]]]:
    """Return the causal logits of latent attention from its plain factors; rotary rows are interleaved pairs."""

    def pairs(vector: Tensor) -> Tensor:
        return torch.complex(vector[0::2], vector[1::2])

    inputs = x if layer.query_down is None else x @ layer.query_down.T
    logits = []
    for head in range(len(layer.query_nope)):
        logits.append([])
        for i in range(len(x)):
            still = layer.query_nope[head] @ inputs[i]
            turning = turn(pairs(layer.query_rope[head] @ inputs[i]), frequencies, i)
            row = []
            for j in range(i + 1):
                latent = cached_latent(layer, x[j])
                rotary = turn(pairs(layer.key_rope @ x[j]), frequencies, j)
                logit = still @ (layer.key_up[head] @ latent) + (turning * rotary.conj()).sum().real
                row.append(logit.item() * layer.softmax_scale)
            logits[-1].append(row)
    return logits


def latent_attention(layer, x: Tensor, frequencies: Tensor) -> Tensor:
    """Return the output of latent attention from its plain factors."""
    output = torch.zeros_like(x)
    for head, logits in enumerate(latent_logits(layer, x, frequencies)):
        for i, row in enumerate(softmax_rows(logits)):
            for j, probability in enumerate(row):
                output[i] += layer.output[head] @ (layer.value_up[head] @ cached_latent(layer, x[j])) * probability
    return output


def relative_error(found: Tensor, expected: Tensor) -> float:
    return ((found - expected).norm() / expected.norm()).item()


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return weight * x / (x.square().mean(-1, keepdim=True) + eps).sqrt()


def latent_attention_matrix(layer, x: Tensor, frequencies: Tensor) -> Tensor:
    """Return what ``latent_attention`` does, for many tokens at once."""
    inputs = x if layer.query_down is None else x @ layer.query_down.T
    return _attend(
        still=torch.einsum("hni,ti->htn", layer.query_nope, inputs),
        turning=torch.einsum("hri,ti->htr", layer.query_rope, inputs),
        latent=cached_latent(layer, x),
        rotary=x @ layer.key_rope.T,
        key_up=layer.key_up,
        value_up=layer.value_up,
        output=layer.output,
        frequencies=frequencies,
        scale=layer.softmax_scale,
    )


def stored_attention(tensors: dict[str, Tensor], config: dict, x: Tensor, frequencies: Tensor) -> Tensor:
    """Return the output of DeepSeek-V3 attention from its stored tensors, norms and all."""
    heads, eps, rank = config["num_attention_heads"], config["rms_norm_eps"], config["kv_lora_rank"]
    nope, rope = config["qk_nope_head_dim"], config["qk_rope_head_dim"]
    down = x @ tensors["kv_a_proj_with_mqa.weight"].T
    up = tensors["kv_b_proj.weight"].unflatten(0, (heads, -1))
    if "q_proj.weight" in tensors:
        query = x @ tensors["q_proj.weight"].T
    else:
        query = rms_norm(x @ tensors["q_a_proj.weight"].T, tensors["q_a_layernorm.weight"], eps)
        query = query @ tensors["q_b_proj.weight"].T
    query = query.unflatten(-1, (heads, nope + rope)).movedim(1, 0)
    return _attend(
        still=query[..., :nope],
        turning=query[..., nope:],
        latent=rms_norm(down[:, :rank], tensors["kv_a_layernorm.weight"], eps),
        rotary=down[:, rank:],
        key_up=up[:, :nope],
        value_up=up[:, nope:],
        output=tensors["o_proj.weight"].unflatten(1, (heads, -1)).movedim(1, 0),
        frequencies=frequencies,
        scale=(nope + rope) ** -0.5,
    )


def _attend(*, still, turning, latent, rotary, key_up, value_up, output, frequencies, scale) -> Tensor:
    tokens = len(latent)
    turns = torch.polar(torch.ones(tokens, len(frequencies), dtype=latent.dtype), _angles(tokens, frequencies))
    query = torch.complex(turning[..., 0::2], turning[..., 1::2]) * turns
    key = torch.complex(rotary[..., 0::2], rotary[..., 1::2]) * turns
    logits = still @ key_up @ latent.T + torch.einsum("htr,sr->hts", query, key.conj()).real
    future = torch.ones(tokens, tokens, dtype=torch.bool).triu(1)
    probability = (logits * scale).masked_fill(future, -math.inf).softmax(dim=-1)
    return (probability @ latent @ value_up.mT @ output.mT).sum(0)


def _angles(tokens: int, frequencies: Tensor) -> Tensor:
    return torch.arange(tokens, dtype=frequencies.dtype).unsqueeze(-1) * frequencies


def model_logits(
    tensors: dict[str, Tensor], attend, ids: Tensor, *, num_layers: int, eps: float, top_k: int = 0
) -> Tensor:
    """Return the logits of a decoder for one sequence, with ``attend(layer, inputs)`` for its attention.

    With ``top_k``, the MLPs are mixtures whose experts are weighed by a softmax over the chosen ones.
    """

    def linear(name: str, x: Tensor) -> Tensor:
        return x @ tensors[f"{name}.weight"].T

    def mlp(name: str, h: Tensor) -> Tensor:
        gate = linear(f"{name}.gate_proj", h)
        return linear(f"{name}.down_proj", gate * gate.sigmoid() * linear(f"{name}.up_proj", h))

    def mixture(prefix: str, token: Tensor) -> Tensor:
        scores = linear(prefix + "mlp.gate", token)
        chosen = scores.argsort(descending=True)[:top_k].tolist()
        weights = {expert: math.exp(scores[expert] - scores.max()) for expert in chosen}
        parts = [weights[expert] * mlp(f"{prefix}mlp.experts.{expert}", token) for expert in chosen]
        return torch.stack(parts).sum(0) / sum(weights.values())

    x = tensors["model.embed_tokens.weight"][ids]
    for index in range(num_layers):
        prefix = f"model.layers.{index}."
        x = x + attend(index, rms_norm(x, tensors[prefix + "input_layernorm.weight"], eps))
        h = rms_norm(x, tensors[prefix + "post_attention_layernorm.weight"], eps)
        x = x + (torch.stack([mixture(prefix, token) for token in h]) if top_k else mlp(prefix + "mlp", h))
    head = "lm_head" if "lm_head.weight" in tensors else "model.embed_tokens"
    return linear(head, rms_norm(x, tensors["model.norm.weight"], eps))
