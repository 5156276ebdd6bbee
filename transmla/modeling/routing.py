"""What the routers of a mixture of experts decide: recorded, or dictated by another model of the same experts.

In every family transformers calls a router with the hidden states of all tokens in a row, and is given its logits, the
weights of the chosen experts, and which these are.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from transmla.arch.experts import ROUTER

_ROUTER_MODULE = ROUTER.removesuffix(".weight")


@dataclass(frozen=True, eq=False)
class Routing:
    """What one router decided for the tokens of one pass."""

    logits: Float[Tensor, "tokens experts"]
    weights: Float[Tensor, "tokens chosen"]
    experts: Int[Tensor, "tokens chosen"]

    def exchanged(self, other: Routing) -> float:
        """Return the share of a token's experts that another router exchanges: half the distance of the weights."""
        return ((self._spread() - other._spread()).abs().sum(-1) / 2).mean().item()

    def off(self, other: Routing) -> float:
        """Return the largest difference of a logit, in standard deviations, but for what all of a token have in common.

        The choice of experts, and their weights, are the same whatever is added to all logits of a token.
        """
        wanted, found = (logits - logits.mean(-1, keepdim=True) for logits in (self.logits, other.logits))
        return ((found - wanted).abs().max() / wanted.std()).item()

    def _spread(self) -> Float[Tensor, "tokens experts"]:
        return torch.zeros_like(self.logits).scatter(1, self.experts, self.weights.to(self.logits.dtype))


@contextmanager
def recorded_routing(model: nn.Module, dictated: Sequence[Routing] | None = None) -> Iterator[list[Routing]]:
    """Yield what the routers decide in one pass, layer by layer; nothing for a model without experts.

    Args:
        model: the model that runs.
        dictated: what is done in place of what the model's own routers decide, layer by layer.
    """
    seen: list[Routing] = []

    def hook(_module: nn.Module, _inputs: Any, output: Any) -> Any:
        logits, weights, experts = output
        seen.append(Routing(logits.float(), weights, experts))
        if dictated is None:
            return None
        given = dictated[len(seen) - 1]
        return logits, given.weights.to(weights), given.experts

    routers = [module for name, module in model.named_modules() if name.endswith(_ROUTER_MODULE)]
    handles = [router.register_forward_hook(hook) for router in routers]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()
