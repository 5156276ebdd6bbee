"""Weights as training wants them: latents of ordinary size, and no norm in their way.

A neutralised latent norm (ENGINES.md, facts 1 and 2) needs rows of about 1e-6, which the first step of an optimiser
would destroy. :func:`make_plain` writes the rows large and puts a constant where the norm stood; the residual stream of
the quantizable profile, a thousand times as large as the portable one's, shrinks as well. All of it goes by powers of
two, so that :meth:`PlainFactors.native` gives back the very bits that came in, as long as nothing was trained.

A norm that does something (``--latent-norm live``, DeepSeek's own models) stays, and is trained.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from transmla.modeling.exchange import has_latent_attention

# eps of the latent norm in transformers (fact 2), and of the portable profile.
_EPS = 1e-6
# A neutralised norm keeps a latent's mean square far below eps, one that divides has it far above.
_NEUTRAL = 0.05
# What a projection may grow, in powers of two, before its norm's weight does.
_SLACK = 0.01

_PROJECTIONS = {"kv_a_layernorm": "kv_a_proj_with_mqa", "q_a_layernorm": "q_a_proj"}
_ADDING_TO_STREAM = ("embed_tokens.weight", "o_proj.weight", "o_proj.bias", "down_proj.weight", "experts.down_proj")


class FixedScale(nn.Module):
    """Stands where a neutralised norm stood."""

    def __init__(self, scale: float) -> None:
        super().__init__()
        self.scale = scale

    def forward(self, latent: Tensor) -> Tensor:
        """Multiply by the constant."""
        return latent * self.scale


@dataclass(frozen=True)
class TakenOut:
    """A norm that has been taken out.

    Attributes:
        attention: name of the attention module.
        norm, projection: names inside it.
        weight: each number of the norm's weight.
        power: what the rows have been multiplied by.
        rank: number of those rows.
        gain: largest weight of the norm on the layer's input.
        size: what :func:`_size` said of the plain rows.
    """

    attention: str
    norm: str
    projection: str
    weight: float
    power: float
    rank: int
    gain: float
    size: float


@dataclass(frozen=True)
class PlainFactors:
    """How the weights of a model have been changed, which is also how to change them back.

    Attributes:
        stream: what everything that adds to the residual stream has been divided by.
        norms: the latent norms that have been taken out.
    """

    stream: float
    norms: tuple[TakenOut, ...]

    def native(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return the native tensors, in float32, of plain ones: the same names, and the norms that belong to them.

        Rows that training has made longer are written smaller, and their norm's weight larger, so that the norm stays
        as neutral as it was for every token that there can be.

        Args:
            state: weights by name, all of a model's or some of them.
        """
        native = {
            name: tensor.float() * self.stream if name.endswith(_ADDING_TO_STREAM) else tensor.float()
            for name, tensor in state.items()
        }
        for out in self.norms:
            weight, bias = (f"{out.attention}.{out.projection}.{part}" for part in ("weight", "bias"))
            if weight not in native:
                continue
            layer = out.attention.rpartition(".")[0]
            gain = _gain(native.get(f"{layer}.input_layernorm.weight"), out.gain)
            growth = _size(native[weight], native.get(bias), out.rank, gain) / out.size if out.size else 1.0
            larger = 2.0 ** math.ceil(math.log2(max(1.0, growth)) - _SLACK)
            for name in (weight, bias):
                if name in native:
                    rows, others = native[name].tensor_split([out.rank])
                    native[name] = torch.cat([rows / (out.power * larger), others])
            native[f"{out.attention}.{out.norm}.weight"] = native[weight].new_full((out.rank,), out.weight * larger)
        return native


@torch.no_grad()
def make_plain(model: Any) -> PlainFactors:
    """Change a loaded DeepSeek-V3 model in place, so that it can be trained; say how to change it back.

    The function that it computes is the same as an engine's, up to the error of the neutralised norms; in the
    quantizable profile, too, which Transformers cannot compute otherwise.
    """
    eps = model.config.rms_norm_eps
    stream = 2.0 ** round(math.log2(math.sqrt(eps / _EPS)))
    if stream != 1:
        for name, tensor in model.state_dict().items():
            if name.endswith(_ADDING_TO_STREAM):
                tensor.div_(stream)
        for module in model.modules():
            if getattr(module, "variance_epsilon", None) == eps:
                module.variance_epsilon = eps / stream**2
    norms = []
    layer: Any
    for name, layer in model.named_modules():
        attention = getattr(layer, "self_attn", None)
        if attention is None or not has_latent_attention(attention):
            continue
        gain = _gain(layer.input_layernorm.weight, 1.0)
        for norm, projection in _PROJECTIONS.items():
            if getattr(attention, norm, None) is not None:
                out = _take_out(attention, f"{name}.self_attn", norm, projection, eps=eps, gain=gain)
                norms += [out] if out else []
    return PlainFactors(stream, tuple(norms))


def _take_out(attention: Any, path: str, norm: str, projection: str, *, eps: float, gain: float) -> TakenOut | None:
    weight: Tensor = getattr(attention, norm).weight
    linear: nn.Linear = getattr(attention, projection)
    rank = len(weight)
    rows = linear.weight[:rank]
    latent_square = rows.float().square().sum().item() * gain**2 / rank
    if weight.min() != weight.max() or latent_square > _NEUTRAL * eps:
        return None
    scale = weight[0].item() / math.sqrt(eps)
    power = 2.0 ** round(math.log2(scale))
    rows.mul_(power)
    if linear.bias is not None:
        linear.bias[:rank].mul_(power)
    attention.set_submodule(norm, FixedScale(scale / power))
    size = _size(linear.weight, linear.bias, rank, gain)
    return TakenOut(path, norm, projection, weight[0].item(), power, rank, gain, size)


def _gain(norm: Tensor | None, otherwise: float) -> float:
    return otherwise if norm is None else norm.abs().max().item()


def _size(weight: Tensor, bias: Tensor | None, rank: int, gain: float) -> float:
    """Return how long the latent of any token can be, but for a constant."""
    rows = weight[:rank].float() * (gain * math.sqrt(weight.shape[1]))
    if bias is not None:
        rows = torch.cat([rows, bias[:rank, None].float()], dim=1)
    return math.sqrt(max(0.0, torch.linalg.eigvalsh(rows @ rows.mT)[-1].item()))
