"""The source layer by layer: its tensors, its experts one by one, its attention as linear maps, its residual stream."""

from collections.abc import Iterator, Mapping

import torch
from jaxtyping import Int
from torch import Tensor, nn

from transmla.arch.experts import DOWN, GATE_UP, Expert, is_expert
from transmla.arch.weight_names import as_class_names
from transmla.calibration.linearize import PROJECTIONS, nearest_linear, token_costs
from transmla.calibration.moments import AttentionWeights
from transmla.calibration.stream import ResidualStream, SourceStream
from transmla.convert.plan import ConversionPlan


def read_layer(plan: ConversionPlan, index: int) -> dict[str, Tensor]:
    """Read a source layer but for its experts, in its storage type, named as in transformers and relative to it."""
    prefix = plan.spec.layer_prefix(index)
    names = [name for name in plan.source_shapes if name.startswith(prefix) and not is_expert(name)]
    tensors = {name.removeprefix(prefix): tensor for name, tensor in plan.reader.read(names).items()}
    shapes = {name.removeprefix(prefix): shape for name, shape in plan.skeleton.shapes.items()}
    return as_class_names(tensors, plan.spec.family, shapes)


def read_experts(plan: ConversionPlan, index: int) -> Iterator[Expert]:
    """Read the experts of a source layer one by one, in their storage type, stored singly or packed."""
    prefix, names, mixture = plan.spec.layer_prefix(index), plan.spec.family.experts, plan.spec.mixture
    if names is None or mixture is None:
        return
    for number in range(mixture.num_experts):
        if prefix + DOWN in plan.source_shapes:
            gate, up = plan.reader.read_part(prefix + GATE_UP, number).chunk(2)
            expert = Expert(number, gate, up, plan.reader.read_part(prefix + DOWN, number))
            del gate, up
        else:
            own = (prefix + name.format(number) for name in (names.gate, names.up, names.down))
            expert = Expert(number, *plan.reader.read(own).values())
        yield expert
        # Before the next one is read, not after.
        del expert


def attention_weights(
    plan: ConversionPlan,
    tensors: Mapping[str, Tensor],
    layer: nn.Module | None = None,
    *,
    source: SourceStream | None = None,
    inputs: ResidualStream | None = None,
) -> AttentionWeights:
    """Take the attention of a source layer, in float32 on the device.

    Args:
        tensors: of the layer, as they were read.
        layer: the layer itself, and
        source: the stream in front of it, and
        inputs: the stream that the converted layer will meet: what is not linear is fitted on its first windows.
    """
    spec = plan.spec

    def tensor(name: str, kind: str) -> Tensor:
        return tensors[f"{spec.family.attention}.{name}.{kind}"].to(plan.device, torch.float32)

    weights = {name: tensor(name, "weight") for name in ("q_proj", "k_proj", "v_proj", "o_proj")}
    output_bias = None
    if spec.biased:
        # Attention shares out one in all, so what every value has in common is put out whatever it does.
        shared = tensor("v_proj", "bias").unflatten(0, (spec.num_key_value_heads, 1, spec.head_dim))
        output_bias = weights["o_proj"] @ shared.expand(-1, spec.num_key_value_groups, -1).flatten()
        if "o_proj" in spec.biases:
            output_bias = output_bias + tensor("o_proj", "bias")
        for name in ("q_proj", "k_proj"):
            weights[name] = torch.cat([weights[name], tensor(name, "bias").unsqueeze(1)], dim=1)
        weights["v_proj"] = nn.functional.pad(weights["v_proj"], (0, 1))
    if names := sorted(spec.nonlinear):
        assert layer is not None, "without text such a source is refused"
        assert source is not None, "without text such a source is refused"
        fit = plan.counts.fit
        gram = AttentionWeights.from_projections(spec, **weights).output_gram
        costs = token_costs(spec, source.projected(layer, fit, PROJECTIONS), gram)
        seen = (inputs or source).projected(layer, fit, names)
        projections = {name: weights[name] for name in names}
        weights |= nearest_linear(seen, costs, projections, ridge=plan.method.options.linear_ridge)
    weights["q_proj"] = weights["q_proj"] * spec.logit_scale
    return AttentionWeights.from_projections(spec, **weights, output_bias=output_bias)


def source_stream(plan: ConversionPlan, windows: Int[Tensor, "windows tokens"]) -> SourceStream:
    """Return the source's residual stream in front of the first layer."""
    embedding = plan.spec.family.embedding
    return SourceStream(
        plan.skeleton,
        plan.spec,
        plan.reader.read([embedding])[embedding],
        windows,
        device=plan.device,
        dtype=getattr(torch, plan.request.compute_dtype),
        batch_size=plan.request.batch_size,
    )


def as_stored(plan: ConversionPlan, name: str, weight: Tensor) -> Tensor:
    """Cast a copied weight to the storage type, once; scaled first if it writes to the residual stream."""
    residual = name.endswith((*plan.spec.family.residual_writers, plan.spec.family.embedding))
    if residual and plan.residual != 1:
        weight = weight.to(plan.device, torch.float32) * plan.residual
    return weight.to(plan.dtype)
