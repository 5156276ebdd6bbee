"""How a checkpoint stores a model: experts one by one or packed, and weights that are fused.

Everything else in the package names weights as transformers' class does.
"""

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from transmla.arch.experts import ROUTER, are_packed, unpacked_shapes
from transmla.arch.families import Family
from transmla.arch.spec import AttentionSpec
from transmla.errors import CheckpointError


def stored_shapes(
    shapes: Mapping[str, torch.Size], family: Family, headers: Iterable[str], *, tied: bool
) -> dict[str, torch.Size]:
    """Return what a checkpoint must hold: every tensor of the class, under its stored name, but for a tied head.

    Args:
        shapes: of the tensors of the class.
        family: of the model.
        headers: names that are stored: experts may be packed or not.
        tied: whether the head is the embedding.
    """
    stored = {name: shape for name, shape in shapes.items() if not (tied and name == family.head)}
    for whole, parts in family.fused.items():
        for name in [name for name in stored if name.endswith(parts[0])]:
            prefix = name.removesuffix(parts[0])
            rows = [stored.pop(prefix + part) for part in parts]
            stored[prefix + whole] = torch.Size([sum(shape[0] for shape in rows), *rows[0][1:]])
    if family.experts is None or are_packed(headers):
        return stored
    return unpacked_shapes(stored, family.experts)


def check_layers(headers: Iterable[str], num_hidden_layers: int, *, prefix: str = "model.layers") -> None:
    """Make sure that there are as many layers as the config says, before a skeleton of them is made.

    Raises:
        CheckpointError: there are not.
    """
    start, names = f"{prefix}.", list(headers)
    layers = {name.removeprefix(start).partition(".")[0] for name in names if name.startswith(start)}
    if not layers:
        raise CheckpointError(
            f"No tensor is named {start}…, as Transformers names layers; there is {min(names, default='none')}."
        )
    if len(layers) < num_hidden_layers:
        raise CheckpointError(
            f"config.json has num_hidden_layers {num_hidden_layers}, but the weights are of {len(layers)} layers."
        )


def check_depth(spec: AttentionSpec, headers: Iterable[str]) -> None:
    """Make sure that there are as many layers and experts as the config says, before a skeleton of them is made.

    Raises:
        CheckpointError: there are not.
    """
    names = list(headers)
    check_layers(names, spec.num_hidden_layers, prefix=spec.family.layers)
    if spec.mixture and not are_packed(names) and spec.mixture.num_experts > len(names):
        raise CheckpointError(f"config.json has {spec.mixture.num_experts} experts, and the weights fewer tensors.")


def as_class_names(
    tensors: Mapping[str, Tensor], family: Family, shapes: Mapping[str, torch.Size]
) -> dict[str, Tensor]:
    """Return a layer's tensors, but for its experts, as the class names them; views where they were fused.

    Args:
        tensors: as they were stored, named relative to the layer.
        family: of the model.
        shapes: of the layer's tensors in the class, named likewise.
    """
    named = dict(tensors)
    for whole, parts in family.fused.items():
        named |= zip(parts, named.pop(whole).split([shapes[part][0] for part in parts]), strict=True)
    if family.experts and family.experts.router in named:
        named[ROUTER] = named.pop(family.experts.router)
    return named


def left_over(headers: Iterable[str], stored: Mapping[str, torch.Size], family: Family) -> tuple[str, ...]:
    """Return the names of tensors that are no part of the model that is converted."""
    # A tied head may be stored all the same, and old checkpoints hold tables that every class computes.
    return tuple(
        sorted(
            name
            for name in headers
            if name not in stored and name != family.head and not name.endswith("rotary_emb.inv_freq")
        )
    )
