"""From plain factors to the tensors of a native DeepSeek-V3 layer.

The latent norm is neutralized as :mod:`transmla.deepseek.neutral_norm` says.
A layer that has a norm of its own (:mod:`transmla.convert.fit.latent_norm`) is written as it is.
"""

import math
from collections.abc import Mapping

import torch
from jaxtyping import Float
from torch import Tensor

from transmla.convert.latent_attention import LatentAttention
from transmla.deepseek.names import BIASED, KV_DOWN, KV_UP, LATENT_NORMS, OUTPUT, QUERY, QUERY_DOWN, QUERY_UP
from transmla.deepseek.neutral_norm import NeutralNorm, neutralize
from transmla.deepseek.sizes import MLASizes


def to_deepseek(
    layer: LatentAttention,
    sizes: MLASizes,
    norm: NeutralNorm,
    *,
    input_moment: Float[Tensor, "hidden hidden"] | None,
    input_bound: float,
    residual: float,
) -> dict[str, Tensor]:
    """Write the factors as DeepSeek-V3 tensors, named relative to the attention module.

    Args:
        layer: plain factors; padded here to ``sizes``.
        sizes: sizes of the target.
        norm: how the latent norm is neutralized.
        input_moment: E[x xᵀ] of the layer input, for the size of an average latent; with biases, x ends in a one. A
            bounded norm does not need it.
        input_bound: largest possible length ‖x‖ of the layer input.
        residual: factor on what is added to the residual stream, from :func:`residual_scale`.
    """
    layer = layer.padded(sizes)
    # The engine divides by sqrt(qk_head_dim); the queries carry the ratio to the source's scale.
    query = layer.query * (layer.softmax_scale * math.sqrt(sizes.qk_head_dim))
    latent, weight = layer.latent, layer.latent_norm
    if weight is None:
        latent, weight = neutralize(layer.latent, norm, input_moment, input_bound)
    tensors = {
        f"{KV_DOWN}.weight": torch.cat([latent, layer.key_rope]),
        f"{LATENT_NORMS[KV_DOWN]}.weight": weight,
        f"{KV_UP}.weight": torch.cat([layer.key_up, layer.value_up], dim=1).flatten(0, 1),
        f"{OUTPUT}.weight": layer.output.movedim(0, 1).flatten(1) * residual,
    }
    if layer.query_down is None:
        tensors[f"{QUERY}.weight"] = query.flatten(0, 1)
    else:
        down, weight = neutralize(layer.query_down, norm, input_moment, input_bound)
        tensors[f"{QUERY_DOWN}.weight"] = down
        tensors[f"{LATENT_NORMS[QUERY_DOWN]}.weight"] = weight
        tensors[f"{QUERY_UP}.weight"] = query.flatten(0, 1)
    if layer.output_bias is not None:
        tensors[f"{OUTPUT}.bias"] = layer.output_bias * residual
        for name in BIASED:
            matrix = tensors[f"{name}.weight"]
            tensors[f"{name}.weight"], tensors[f"{name}.bias"] = matrix[:, :-1], matrix[:, -1]
    return tensors


def from_deepseek(
    tensors: Mapping[str, Tensor], sizes: MLASizes, norm: NeutralNorm, *, residual: float, own_norm: bool = False
) -> LatentAttention:
    """Read the plain factors back from what :func:`to_deepseek` wrote; its padding stays, its query scale too.

    ``own_norm`` says that the layer had a norm of its own.
    """
    tensors = dict(tensors)
    if f"{OUTPUT}.bias" in tensors:
        for name in BIASED:
            tensors[f"{name}.weight"] = torch.cat([tensors[f"{name}.weight"], tensors[f"{name}.bias"].unsqueeze(1)], 1)
    heads = tensors[f"{KV_UP}.weight"].shape[0] // (sizes.qk_nope_head_dim + sizes.v_head_dim)
    rows, key_rope = tensors[f"{KV_DOWN}.weight"].tensor_split([sizes.kv_lora_rank])
    up = tensors[f"{KV_UP}.weight"].unflatten(0, (heads, -1))
    key_up, value_up = up.split([sizes.qk_nope_head_dim, sizes.v_head_dim], dim=1)
    query = tensors[f"{QUERY}.weight" if sizes.q_lora_rank is None else f"{QUERY_UP}.weight"].unflatten(0, (heads, -1))
    query_nope, query_rope = query.split([sizes.qk_nope_head_dim, sizes.qk_rope_head_dim], dim=1)
    output = tensors[f"{OUTPUT}.weight"].unflatten(1, (heads, -1)).movedim(1, 0) / residual

    def restored(down: str) -> Tensor:
        weight = tensors[f"{LATENT_NORMS[down]}.weight"]
        return tensors[f"{down}.weight"][: len(weight)] * (weight / math.sqrt(norm.eps)).unsqueeze(-1)

    return LatentAttention(
        query_nope=query_nope,
        query_rope=query_rope,
        latent=rows if own_norm else restored(KV_DOWN),
        latent_norm=tensors[f"{LATENT_NORMS[KV_DOWN]}.weight"] if own_norm else None,
        key_rope=key_rope,
        key_up=key_up,
        value_up=value_up,
        output=output,
        output_bias=tensors[f"{OUTPUT}.bias"] / residual if f"{OUTPUT}.bias" in tensors else None,
        softmax_scale=sizes.qk_head_dim**-0.5,
        query_down=None if sizes.q_lora_rank is None else restored(QUERY_DOWN),
    )
