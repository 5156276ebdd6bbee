"""The matrices of a mixture of experts: one by one in most checkpoints, packed into three dimensions by transformers 5.

Inside a layer transformers names them alike in every family, :data:`GATE_UP`, :data:`DOWN` and :data:`ROUTER`; stored
one by one they have the family's own names.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

ROUTER = "mlp.gate.weight"
GATE_UP = "mlp.experts.gate_up_proj"
DOWN = "mlp.experts.down_proj"


@dataclass(frozen=True)
class ExpertNames:
    """How a checkpoint names the router, and the matrices of expert ``{}``; as DeepSeek does, unless told."""

    router: str = ROUTER
    gate: str = "mlp.experts.{}.gate_proj.weight"
    up: str = "mlp.experts.{}.up_proj.weight"
    down: str = "mlp.experts.{}.down_proj.weight"


@dataclass(frozen=True)
class Mixture:
    """Sizes of a mixture of experts that weighs its experts by a softmax over the chosen ones."""

    num_experts: int
    num_experts_per_tok: int
    intermediate_size: int


def unpack(tensors: Mapping[str, Tensor], names: ExpertNames) -> dict[str, Tensor]:
    """Return the tensors with views of single experts in the place of packed ones; prefixes may stand before names."""
    unpacked: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        if name.endswith(GATE_UP):
            prefix = name.removesuffix(GATE_UP)
            for index, (gate, up) in enumerate(expert.chunk(2) for expert in tensor):
                unpacked |= {prefix + names.gate.format(index): gate, prefix + names.up.format(index): up}
        elif name.endswith(DOWN):
            unpacked |= {name.removesuffix(DOWN) + names.down.format(i): expert for i, expert in enumerate(tensor)}
        elif name.endswith(ROUTER):
            unpacked[name.removesuffix(ROUTER) + names.router] = tensor
        else:
            unpacked[name] = tensor
    return unpacked


def unpacked_shapes(shapes: Mapping[str, torch.Size], names: ExpertNames) -> dict[str, torch.Size]:
    """Do with shapes what :func:`unpack` does with tensors."""
    empty = {name: torch.empty(shape, device="meta") for name, shape in shapes.items()}
    return {name: tensor.shape for name, tensor in unpack(empty, names).items()}


def pack(tensors: Mapping[str, Tensor], names: ExpertNames) -> dict[str, Tensor]:
    """Return a layer's tensors with single experts packed; undoes :func:`unpack`, and leaves alone what is packed."""
    pattern = re.compile(re.escape(names.down).replace(r"\{\}", r"\d+"))
    experts = range(sum(1 for name in tensors if pattern.fullmatch(name)))
    if not experts:
        return dict(tensors)
    left = dict(tensors)
    packed = {ROUTER: left.pop(names.router)}
    # Each is dropped as soon as it has been copied.
    packed[GATE_UP] = torch.stack(
        [torch.cat([left.pop(names.gate.format(i)), left.pop(names.up.format(i))]) for i in experts]
    )
    packed[DOWN] = torch.stack([left.pop(names.down.format(i)) for i in experts])
    return left | packed
