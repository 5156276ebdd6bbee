"""Weights as training wants them: no neutralized norm in their way, and factors of like size.

A converted checkpoint is written for engines. Its latent rows are about 1e-6, so that a norm does nothing to them
(docs/concepts/checkpoint-format.md, "The neutral latent norm"); undone, they are ten, and the up-projections behind
them a thousandth, because tokens were made white. An optimizer whose steps are as large everywhere would destroy the
small ones. But a diagonal matrix between two factors is free: U c = (U D) (D⁻¹ c). So :func:`reparametrize` puts a
constant where each neutralized norm stood, and chooses these matrices such that rows and the columns that meet them are
equally large: latents and up-projections, queries and keys, values and outputs. The residual stream of the quantizable
profile, a thousand times the portable one's, shrinks too.

All of it goes by powers of two, so that :meth:`Reparametrization.native` gives back the very bits that came in, as long
as nothing was trained. A norm that does something (``--latent-norm fitted``, DeepSeek's own models) stays, and is
trained.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from transmla.deepseek.names import ADDED_TO_STREAM, KV_DOWN, KV_UP, LATENT_NORMS, OUTPUT, QUERY, QUERY_DOWN, QUERY_UP
from transmla.errors import UnsupportedModelError
from transmla.linalg.latent_norm import LATENT_EPS
from transmla.modeling.absorption import has_latent_attention

# A neutralized norm keeps a latent's mean square far below eps, one that divides has it far above.
_NEUTRAL = 0.05
# What a projection may grow, in powers of two, before its norm's weight does.
_SLACK = 0.01
# Each factor meets several others, so balancing takes some rounds.
_ROUNDS = 4


class ConstantScale(nn.Module):
    """Stands where a neutralized norm stood."""

    def __init__(self, scale: float) -> None:
        super().__init__()
        self.scale = scale

    def forward(self, latent: Tensor) -> Tensor:
        """Multiply by the constant."""
        return latent * self.scale


@dataclass(frozen=True)
class Scale:
    """Powers of two by which the rows and the columns of a projection have been multiplied."""

    rows: Float[Tensor, " out"]
    columns: Float[Tensor, " in"]


@dataclass(frozen=True)
class RemovedNorm:
    """A norm that has been taken out.

    Attributes:
        norm, projection, input_norm: names of the modules; the last one is the norm on the layer's input.
        weight: each number of its weight.
        rank: number of rows of the projection that it followed.
        gain: largest weight of the norm on the input.
        size: what :func:`_size` said of the native rows.
    """

    norm: str
    projection: str
    input_norm: str
    weight: float
    rank: int
    gain: float
    size: float


@dataclass(frozen=True)
class Reparametrization:
    """How the weights of a model have been changed, which is also how to change them back.

    Attributes:
        stream: what everything that adds to the residual stream has been divided by.
        scales: of projections, by name.
        norms: the latent norms that have been taken out.
    """

    stream: float
    scales: Mapping[str, Scale]
    norms: tuple[RemovedNorm, ...]

    def native(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return the native tensors, in float32, of plain ones: the same names, and the norms that belong to them.

        Rows that training has made longer are written smaller, and their norm's weight larger, so that the norm stays
        as neutral as it was for every token that there can be.

        Args:
            state: weights by name, all of a model's or some of them.
        """
        native = {name: self._unscaled(name, tensor.float()) for name, tensor in state.items()}
        for out in self.norms:
            weight, bias = (f"{out.projection}.{part}" for part in ("weight", "bias"))
            if weight not in native:
                continue
            gain = _gain(native.get(f"{out.input_norm}.weight"), out.gain)
            growth = _size(native[weight], native.get(bias), out.rank, gain) / out.size if out.size else 1.0
            larger = 2.0 ** math.ceil(math.log2(max(1.0, growth)) - _SLACK)
            for name in (weight, bias):
                if name in native:
                    rows, others = native[name].tensor_split([out.rank])
                    native[name] = torch.cat([rows / larger, others])
            native[f"{out.norm}.weight"] = native[weight].new_full((out.rank,), out.weight * larger)
        return native

    def without_norms(self, names: Collection[str]) -> Reparametrization:
        """Return the same for a model in which these norms are back, before rows and columns that are native."""
        back = [out for out in self.norms if out.norm in names]
        scales = dict(self.scales)
        for out in back:
            rows = scales[out.projection].rows.clone()
            rows[: out.rank] = 1
            scales[out.projection] = replace(scales[out.projection], rows=rows)
            behind = out.norm.replace("a_layernorm", "b_proj")
            scales[behind] = replace(scales[behind], columns=torch.ones_like(scales[behind].columns))
        return replace(self, scales=scales, norms=tuple(out for out in self.norms if out not in back))

    def _unscaled(self, name: str, tensor: Tensor) -> Tensor:
        if name.endswith(ADDED_TO_STREAM):
            tensor = tensor * self.stream
        module, _, part = name.rpartition(".")
        if (scale := self.scales.get(module)) is None:
            return tensor
        rows, columns = scale.rows.to(tensor.device), scale.columns.to(tensor.device)
        return tensor / rows if part == "bias" else tensor / rows[:, None] / columns


@torch.no_grad()
def reparametrize(model: Any) -> Reparametrization:
    """Change a loaded DeepSeek-V3 model in place, so that it can be trained; say how to change it back.

    The function that it computes is the same as an engine's, up to the error of the neutralized norms; in the
    quantizable profile, too, which Transformers cannot compute otherwise. Other models stay as they are.

    Raises:
        UnsupportedModelError: norms that are not where they are expected.
    """
    if not has_latent_attention(model):
        return Reparametrization(1.0, {}, ())
    eps = model.config.rms_norm_eps
    stream = 2.0 ** round(math.log2(math.sqrt(eps / LATENT_EPS)))
    if stream != 1:
        for name, tensor in model.state_dict().items():
            if name.endswith(ADDED_TO_STREAM):
                tensor.div_(stream)
        norms = [module for module in model.modules() if getattr(module, "variance_epsilon", None) == eps]
        # Two norms a layer and the last one are on the stream.
        if len(norms) != (expected := 2 * model.config.num_hidden_layers + 1):
            raise UnsupportedModelError(
                f"{len(norms)} norms of this model have the eps of its config, where {expected} are on its residual "
                "stream: this release of transformers has other norms than those that were tested."
            )
        for norm in norms:
            norm.variance_epsilon = eps / stream**2
    scales: dict[str, Scale] = {}
    taken: list[RemovedNorm] = []
    layer: Any
    for name, layer in model.named_modules():
        attention = getattr(layer, "self_attn", None)
        if attention is not None and has_latent_attention(attention):
            factors = _Factors(attention)
            taken += factors.take_out_norms(name, eps=eps, gain=_gain(layer.input_layernorm.weight, 1.0))
            for _ in range(_ROUNDS):
                factors.balance()
            scales |= {f"{name}.self_attn.{projection}": scale for projection, scale in factors.scales.items()}
    return Reparametrization(stream, scales, tuple(taken))


class _Factors:
    """The projections of one attention module, and what they have been multiplied by."""

    def __init__(self, attention: Any) -> None:
        self.attention = attention
        self.query = QUERY if attention.q_lora_rank is None else QUERY_UP
        names = [self.query, KV_DOWN, KV_UP, OUTPUT]
        self.projections: dict[str, nn.Linear] = {
            name: getattr(attention, name) for name in (*names, *([QUERY_DOWN] if attention.q_lora_rank else []))
        }
        self.scales = {
            name: Scale(linear.weight.new_ones(linear.weight.shape[0]), linear.weight.new_ones(linear.weight.shape[1]))
            for name, linear in self.projections.items()
        }
        # Norms, by the projection that they follow, that do something.
        self.norms = dict(LATENT_NORMS)

    def take_out_norms(self, layer: str, *, eps: float, gain: float) -> list[RemovedNorm]:
        """Replace the norms that are neutralized by constants near 1."""
        taken = []
        for projection, norm in list(self.norms.items()):
            if projection not in self.projections:
                continue
            weight, linear = getattr(self.attention, norm).weight, self.projections[projection]
            rank = len(weight)
            latent_square = linear.weight[:rank].float().square().sum().item() * gain**2 / rank
            if weight.min() != weight.max() or latent_square > _NEUTRAL * eps:
                continue
            size = _size(linear.weight, linear.bias, rank, gain)
            path = f"{layer}.self_attn"
            taken.append(
                RemovedNorm(
                    norm=f"{path}.{norm}",
                    projection=f"{path}.{projection}",
                    input_norm=f"{layer}.input_layernorm",
                    weight=weight[0].item(),
                    rank=rank,
                    gain=gain,
                    size=size,
                )
            )
            scale = weight[0].item() / math.sqrt(eps)
            power = 2.0 ** round(math.log2(scale))
            self.attention.set_submodule(norm, ConstantScale(scale / power))
            self._multiply_rows(projection, slice(0, rank), weight.new_full((rank,), power))
            del self.norms[projection]
        return taken

    def balance(self) -> None:
        """Make rows as large as the columns, or rows, that they meet."""
        attention, query, down, up, output = self.attention, self.query, KV_DOWN, KV_UP, OUTPUT
        rank, nope, value = attention.kv_lora_rank, attention.qk_nope_head_dim, attention.v_head_dim
        rope_rows = slice(rank, None)
        if down not in self.norms:
            self._balance_rows(down, slice(0, rank), up)
        if QUERY_DOWN in self.projections and QUERY_DOWN not in self.norms:
            self._balance_rows(QUERY_DOWN, slice(None), query)
        up_rows = torch.arange(len(self.projections[up].weight)).unflatten(0, (-1, nope + value))
        query_rows = torch.arange(len(self.projections[query].weight)).unflatten(0, (len(up_rows), -1))
        # Non-rotary queries and keys; values and outputs.
        keys, queries = up_rows[:, :nope].flatten(), query_rows[:, :nope].flatten()
        factor = _evening(self._row_sizes(up)[keys], self._row_sizes(query)[queries])
        self._multiply_rows(up, keys, factor)
        self._multiply_rows(query, queries, 1 / factor)
        self._balance_rows(up, up_rows[:, nope:].flatten(), output)
        # A rotation mixes two rows, so all rotary ones share a factor.
        queries = query_rows[:, nope:].flatten()
        sizes = [
            self._row_sizes(name)[rows].square().mean().sqrt() for name, rows in ((down, rope_rows), (query, queries))
        ]
        factor = _evening(*sizes)
        self._multiply_rows(down, rope_rows, factor.expand(len(self.projections[down].weight) - rank))
        self._multiply_rows(query, queries, 1 / factor.expand(len(queries)))

    def _balance_rows(self, left: str, rows: slice | Tensor, right: str) -> None:
        """Even out some rows of one projection and all columns of the one after it."""
        columns = self.projections[right].weight.float().square().mean(0).sqrt()
        factor = _evening(self._row_sizes(left)[rows], columns)
        self._multiply_rows(left, rows, factor)
        self.projections[right].weight.div_(factor)
        self.scales[right].columns.div_(factor)

    def _row_sizes(self, name: str) -> Float[Tensor, " out"]:
        return self.projections[name].weight.float().square().mean(1).sqrt()

    def _multiply_rows(self, name: str, rows: slice | Tensor, factor: Float[Tensor, " rows"]) -> None:
        linear, scale = self.projections[name], self.scales[name]
        linear.weight[rows] = linear.weight[rows] * factor[:, None].to(linear.weight.dtype)
        if linear.bias is not None:
            linear.bias[rows] = linear.bias[rows] * factor.to(linear.bias.dtype)
        scale.rows[rows] = scale.rows[rows] * factor.to(scale.rows.dtype)


def _evening(left: Tensor, right: Tensor) -> Tensor:
    """Return the powers of two which, times the left and under the right, make both as equal as they can be."""
    factor = 2.0 ** (right / left).sqrt().log2().round()
    return torch.where((left > 0) & (right > 0), factor, 1.0)


def _gain(norm: Tensor | None, otherwise: float) -> float:
    return otherwise if norm is None else norm.abs().max().item()


def _size(weight: Tensor, bias: Tensor | None, rank: int, gain: float) -> float:
    """Return how long the latent of any token can be, but for a constant."""
    rows = weight[:rank].float() * (gain * math.sqrt(weight.shape[1]))
    if bias is not None:
        rows = torch.cat([rows, bias[:rank, None].float()], dim=1)
    # In float64, for tiny rows squared are below what float32 holds.
    return math.sqrt(max(0.0, torch.linalg.eigvalsh(rows.double() @ rows.double().mT)[-1].item()))
