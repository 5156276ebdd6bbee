"""From plain factors to the tensors of a native DeepSeek-V3 layer.

Every engine normalises the latent: ``kv_a_layernorm(c) = w · c / sqrt(mean(c²) + eps)``. Written so small that
mean(c²) ≪ eps, the latent passes that norm multiplied by the constant ``w / sqrt(eps)``, which is chosen to restore
its size; the relative error is mean(c²)/(2·eps). The weight w is a power of two, exact in every storage type, and the
rest of the constant goes into the rows of ``kv_a_proj_with_mqa`` before their one cast
(docs/concepts/checkpoint-format.md, "The neutral latent norm"; the eps is a matter of
docs/concepts/checkpoint-format.md, "The eps and the residual stream").
A layer that has a norm of its own (:mod:`transmla.convert.live`) is written as it is.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

import torch
from jaxtyping import Float
from torch import Tensor

from transmla.config import Profile
from transmla.convert.latent import LatentAttention
from transmla.convert.sizes import MLASizes
from transmla.linalg.latent_norm import LATENT_EPS

# The projections from the layer input that DeepSeek-V3 has biases for, where it has any.
_BIASED = ("q_a_proj", "kv_a_proj_with_mqa")


@dataclass(frozen=True)
class NeutralNorm:
    """How small the latent is written.

    Attributes:
        eps: eps of the latent norm, and of every other norm of the target.
        error: relative error mean(c²)/(2·eps) aimed at.
        bounded: aim at it for every possible token, not for the average one. 8-bit blocks cannot hold rows as small as
            that asks for.
    """

    eps: float
    error: float
    bounded: bool


NORMS: Mapping[Profile, NeutralNorm] = MappingProxyType(
    {
        "portable": NeutralNorm(eps=LATENT_EPS, error=1e-6, bounded=True),
        "quantizable": NeutralNorm(eps=1.0, error=1e-4, bounded=False),
    }
)


def residual_scale(eps: float, norm: NeutralNorm) -> float:
    """Return s such that a residual stream s times as large gives the same RMSNorm at the target's eps.

    RMSNorm with eps' = s²·eps of s·x equals RMSNorm with eps of x, exactly.
    """
    return math.sqrt(norm.eps / eps)


def fold_layer(
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
        norm: how the latent norm is neutralised.
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
        latent, weight = _neutralise(layer.latent, norm, input_moment, input_bound)
    tensors = {
        "kv_a_proj_with_mqa.weight": torch.cat([latent, layer.key_rope]),
        "kv_a_layernorm.weight": weight,
        "kv_b_proj.weight": torch.cat([layer.key_up, layer.value_up], dim=1).flatten(0, 1),
        "o_proj.weight": layer.output.movedim(0, 1).flatten(1) * residual,
    }
    if layer.query_down is None:
        tensors["q_proj.weight"] = query.flatten(0, 1)
    else:
        down, weight = _neutralise(layer.query_down, norm, input_moment, input_bound)
        tensors["q_a_proj.weight"] = down
        tensors["q_a_layernorm.weight"] = weight
        tensors["q_b_proj.weight"] = query.flatten(0, 1)
    if layer.output_bias is not None:
        tensors["o_proj.bias"] = layer.output_bias * residual
        for name in _BIASED:
            matrix = tensors[f"{name}.weight"]
            tensors[f"{name}.weight"], tensors[f"{name}.bias"] = matrix[:, :-1], matrix[:, -1]
    return tensors


def unfold_layer(
    tensors: Mapping[str, Tensor], sizes: MLASizes, norm: NeutralNorm, *, residual: float, live: bool = False
) -> LatentAttention:
    """Read the plain factors back from what :func:`fold_layer` wrote; its padding stays, its query scale too.

    ``live`` says that the layer had a norm of its own.
    """
    tensors = dict(tensors)
    if "o_proj.bias" in tensors:
        for name in _BIASED:
            tensors[f"{name}.weight"] = torch.cat([tensors[f"{name}.weight"], tensors[f"{name}.bias"].unsqueeze(1)], 1)
    heads = tensors["kv_b_proj.weight"].shape[0] // (sizes.qk_nope_head_dim + sizes.v_head_dim)
    rows, key_rope = tensors["kv_a_proj_with_mqa.weight"].tensor_split([sizes.kv_lora_rank])
    up = tensors["kv_b_proj.weight"].unflatten(0, (heads, -1))
    key_up, value_up = up.split([sizes.qk_nope_head_dim, sizes.v_head_dim], dim=1)
    query = tensors["q_proj.weight" if sizes.q_lora_rank is None else "q_b_proj.weight"].unflatten(0, (heads, -1))
    query_nope, query_rope = query.split([sizes.qk_nope_head_dim, sizes.qk_rope_head_dim], dim=1)
    output = tensors["o_proj.weight"].unflatten(1, (heads, -1)).movedim(1, 0) / residual

    def restored(down: str, weight: str) -> Tensor:
        return tensors[down][: len(tensors[weight])] * (tensors[weight] / math.sqrt(norm.eps)).unsqueeze(-1)

    return LatentAttention(
        query_nope=query_nope,
        query_rope=query_rope,
        latent=rows if live else restored("kv_a_proj_with_mqa.weight", "kv_a_layernorm.weight"),
        latent_norm=tensors["kv_a_layernorm.weight"] if live else None,
        key_rope=key_rope,
        key_up=key_up,
        value_up=value_up,
        output=output,
        output_bias=tensors["o_proj.bias"] / residual if "o_proj.bias" in tensors else None,
        softmax_scale=sizes.qk_head_dim**-0.5,
        query_down=None if sizes.q_lora_rank is None else restored("q_a_proj.weight", "q_a_layernorm.weight"),
    )


def _neutralise(
    down: Float[Tensor, "rank hidden"], norm: NeutralNorm, moment: Float[Tensor, "hidden hidden"] | None, bound: float
) -> tuple[Float[Tensor, "rank hidden"], Float[Tensor, " rank"]]:
    """Return the shrunken projection and the norm weight that undoes it."""
    if norm.bounded or moment is None:
        mean_square = torch.linalg.eigvalsh(down @ down.mT)[-1].item() * bound**2 / len(down)
    else:
        mean_square = ((down @ moment.to(down)) * down).sum().item() / len(down)
    shrink = math.sqrt(2 * norm.eps * norm.error / mean_square) if mean_square > 0 else 1.0
    weight = 2.0 ** math.ceil(math.log2(math.sqrt(norm.eps) / shrink))
    return down * (math.sqrt(norm.eps) / weight), down.new_full((len(down),), weight)
