"""The matrices of a mixture of experts: one by one in most checkpoints, packed into three dimensions by transformers 5.

Inside a layer transformers names them alike in every family, :data:`GATE_UP`, :data:`DOWN` and :data:`ROUTER`; stored
one by one they have the family's own names.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

ROUTER = "mlp.gate.weight"
EXPERTS = "mlp.experts"
GATE_UP = f"{EXPERTS}.gate_up_proj"
DOWN = f"{EXPERTS}.down_proj"


@dataclass(frozen=True)
class ExpertNames:
    """How a checkpoint names the router, and the matrices of expert ``{}``; as DeepSeek does, unless told."""

    router: str = ROUTER
    gate: str = f"{EXPERTS}.{{}}.gate_proj.weight"
    up: str = f"{EXPERTS}.{{}}.up_proj.weight"
    down: str = f"{EXPERTS}.{{}}.down_proj.weight"


@dataclass(frozen=True)
class Mixture:
    """Sizes of a mixture of experts that weighs its experts by a softmax over the chosen ones."""

    num_experts: int
    num_experts_per_tok: int
    intermediate_size: int


@dataclass(frozen=True, eq=False)
class Expert:
    """The matrices of expert ``index``: it puts out down · (silu(gate · x) * (up · x))."""

    index: int
    gate: Float[Tensor, "intermediate hidden"]
    up: Float[Tensor, "intermediate hidden"]
    down: Float[Tensor, "hidden intermediate"]

    def to(self, device: torch.device, dtype: torch.dtype) -> "Expert":
        """Return it on a device, in a type."""
        return Expert(self.index, *(matrix.to(device, dtype) for matrix in (self.gate, self.up, self.down)))


def is_expert(name: str) -> bool:
    """Return whether a tensor belongs to an expert that is routed to, in any layout."""
    return ".experts." in name


def are_packed(names: Iterable[str]) -> bool:
    """Return whether the experts among stored tensors are packed into three dimensions."""
    return any(name.endswith(GATE_UP) for name in names)


def unpacked_shapes(shapes: Mapping[str, torch.Size], names: ExpertNames) -> dict[str, torch.Size]:
    """Return the shapes with those of single experts in the place of packed ones; prefixes may stand before names."""
    unpacked: dict[str, torch.Size] = {}
    for name, shape in shapes.items():
        if name.endswith(GATE_UP):
            prefix, (experts, rows, columns) = name.removesuffix(GATE_UP), shape
            for half in (names.gate, names.up):
                unpacked |= {prefix + half.format(i): torch.Size([rows // 2, columns]) for i in range(experts)}
        elif name.endswith(DOWN):
            unpacked |= {name.removesuffix(DOWN) + names.down.format(i): shape[1:] for i in range(shape[0])}
        elif name.endswith(ROUTER):
            unpacked[name.removesuffix(ROUTER) + names.router] = shape
        else:
            unpacked[name] = shape
    return unpacked
