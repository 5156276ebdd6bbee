"""Switch on the latent norm of a converted checkpoint (``--latent-norm fitted``), before it is trained.

The cache stays as large as it is, so one of the latent numbers makes room for the anchor
(:mod:`transmla.linalg.latent_norm`): in latents that are white for all tokens, the direction that the up-projections
read least. Three passes over some windows fit every layer: what goes into attention, how long its latents are, and what
the norm makes of them. No inputs are kept.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from functools import partial
from typing import Any, Protocol

import torch
from jaxtyping import Float, Float64
from torch import Tensor
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3RMSNorm

from transmla.linalg.latent_norm import anchored, norm_and_readout, unit_size
from transmla.linalg.near_constant import near_constant
from transmla.modeling.reparametrize import ConstantScale, Reparametrization

NUM_WINDOWS = 32
"""Windows that are enough: what they cannot tell, training will."""

# Below this share of the largest, a latent number is always zero: padding, or never used.
_EMPTY = 1e-10


@torch.no_grad()
def fit_latent_norms(model: Any, plain: Reparametrization, batches: Iterable[dict[str, Tensor]]) -> Reparametrization:
    """Give the layers of a plain model, in place, a norm that is a real one.

    Args:
        model: from :func:`transmla.modeling.reparametrize.reparametrize`.
        plain: what that returned.
        batches: windows to fit on; they are gone through three times.

    Returns:
        How the weights are to be changed back from now on.
    """
    layers = {
        f"{name}.self_attn": layer.self_attn
        for name, layer in model.named_modules()
        if isinstance(getattr(getattr(layer, "self_attn", None), "kv_a_layernorm", None), ConstantScale)
    }
    moments = {name: _Moment(layer) for name, layer in layers.items()}
    _show(model, layers, batches, moments)
    narrowed = {name: _make_room(layer, moments[name].moment) for name, layer in layers.items()}
    lengths = {name: _Length(latent) for name, (latent, _) in narrowed.items()}
    _show(model, layers, batches, lengths)
    normed = {name: _Normed(lengths[name], moments[name]) for name in layers}
    _show(model, layers, batches, normed)
    for name, layer in layers.items():
        _replace(layer, normed[name], narrowed[name][1])
    return plain.without_norms([f"{name}.kv_a_layernorm" for name in layers])


class _Seer(Protocol):
    def add(self, inputs: Float[Tensor, "tokens hidden"]) -> None:
        """Take in what goes into a layer's projections; a one follows where they have biases."""
        ...


class _Moment:
    """What goes into attention: C = E[x xᵀ] and μ = E[x], times the number of tokens."""

    def __init__(self, layer: Any) -> None:
        linear = layer.kv_a_proj_with_mqa
        size = linear.weight.shape[1] + (linear.bias is not None)
        self.moment = torch.zeros(size, size, dtype=torch.float64, device=linear.weight.device)
        self.mean, self.tokens = self.moment[0].clone(), 0

    def add(self, inputs: Float[Tensor, "tokens hidden"]) -> None:
        self.moment += inputs.mT @ inputs
        self.mean += inputs.sum(0)
        self.tokens += len(inputs)

    @property
    def anchor(self) -> Float64[Tensor, " hidden"]:
        return near_constant(self.moment / self.tokens, self.mean / self.tokens)


class _Length:
    """How long the latents are."""

    def __init__(self, latent: Float[Tensor, "rank hidden"]) -> None:
        self.latent, self.longest = latent, latent.new_zeros(())

    def add(self, inputs: Float[Tensor, "tokens hidden"]) -> None:
        self.longest = torch.maximum(self.longest, (inputs @ self.latent.mT).square().sum(-1).max())


class _Normed:
    """What the norm makes of the latents and the anchor."""

    def __init__(self, length: _Length, moment: _Moment) -> None:
        self.latent = length.latent
        self.rows = anchored(self.latent, moment.anchor.to(self.latent), length.longest)
        self.gram = moment.moment.new_zeros(len(self.rows), len(self.rows))
        self.cross = self.gram[:-1].clone()

    def add(self, inputs: Float[Tensor, "tokens hidden"]) -> None:
        normed = unit_size(inputs @ self.rows.mT)
        self.gram += normed.mT @ normed
        self.cross += (inputs @ self.latent.mT).mT @ normed


def _show(
    model: Any, layers: Mapping[str, Any], batches: Iterable[dict[str, Tensor]], seers: Mapping[str, _Seer]
) -> None:
    """Run the model as it is, and show each layer's inputs to its seer."""

    def hook(module: Any, given: tuple[Tensor], seer: _Seer) -> None:
        inputs = given[0].flatten(0, 1).float()
        seer.add(inputs if module.bias is None else torch.cat([inputs, inputs.new_ones(len(inputs), 1)], dim=1))

    handles = [
        layer.kv_a_proj_with_mqa.register_forward_pre_hook(partial(hook, seer=seers[name]))
        for name, layer in layers.items()
    ]
    for batch in batches:
        tokens, positions = (batch[key].to(model.device) for key in ("input_ids", "position_ids"))
        model.get_decoder()(input_ids=tokens, position_ids=positions, use_cache=False)
    for handle in handles:
        handle.remove()


def _make_room(
    layer: Any, moment: Float64[Tensor, "hidden hidden"]
) -> tuple[Float[Tensor, "rank_less_1 hidden"], Float[Tensor, "out rank_less_1"]]:
    """Return down- and up-projection with one latent number less."""
    linear, scale, rank = layer.kv_a_proj_with_mqa, layer.kv_a_layernorm.scale, layer.kv_lora_rank
    rows = linear.weight[:rank].double() * scale
    if linear.bias is not None:
        rows = torch.cat([rows, linear.bias[:rank, None].double() * scale], dim=1)
    values, vectors = torch.linalg.eigh(rows @ moment @ rows.mT)
    used = values > _EMPTY * values[-1]
    root = torch.where(used, values, 0).sqrt()
    inverse = torch.where(used, root, 1).reciprocal() * used
    left, strength, right = torch.linalg.svd(layer.kv_b_proj.weight.double() @ vectors * root, full_matrices=False)
    # Half of the strength to each side, so that both factors stay of like size.
    half, keep = strength[: rank - 1].sqrt(), slice(0, rank - 1)
    latent = half[:, None] * (right[keep] * inverse) @ vectors.mT @ rows
    return latent.float(), (left[:, keep] * half).float()


def _replace(layer: Any, fit: _Normed, up: Float[Tensor, "out rank_less_1"]) -> None:
    weight, old = norm_and_readout(fit.gram, fit.cross)
    linear, rank = layer.kv_a_proj_with_mqa, layer.kv_lora_rank
    rows = fit.rows
    if linear.bias is not None:
        rows, linear.bias[:rank] = rows[:, :-1], rows[:, -1]
    linear.weight[:rank] = rows
    layer.kv_b_proj.weight.copy_(up @ old.float())
    layer.kv_a_layernorm = DeepseekV3RMSNorm(rank).to(linear.weight)
    layer.kv_a_layernorm.weight.copy_(weight)
