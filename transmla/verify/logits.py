"""A checkpoint compared with its source, logit by logit, and for mixtures of experts with the routing told apart.

A converted router is exact only on tokens like those that it was fitted on
(:mod:`transmla.convert.fit.routing`): on others a token may be sent to other experts, after which nothing is the same.
That is no damage. So a mixture runs once more with the experts that its source chose: then its logits must be the
source's, and its routers' logits too, but for what all experts of a token have in common.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional
from transformers import PreTrainedModel

from transmla.data.vocabulary import SharedTokens
from transmla.modeling.routing import Routing, recorded_routing
from transmla.records import Record


class RoutingReport(Record):
    """How a mixture routes, compared with its source.

    Attributes:
        exchanged_experts: share of a token's experts that are others than the source's.
        largest_difference: of two logits, in standard deviations, where the source's experts are taken.
        largest_router_difference: of two logits of a router there, likewise, but for what all experts have in common.
    """

    exchanged_experts: float
    largest_difference: float
    largest_router_difference: float


class LogitsReport(Record):
    """A checkpoint compared with its source, in float32, on a few short texts.

    Attributes:
        num_positions: tokens whose successors were predicted.
        largest_difference: of two logits, in standard deviations of the source's.
        kl: divergence from the source, mean in nats a token.
        kl_of_uniform: the same of a model that finds every token equally likely.
        top1: share of the positions at which both find the same token likeliest.
        routing: of a mixture of experts.
    """

    num_positions: int
    largest_difference: float
    kl: float
    kl_of_uniform: float
    top1: float
    routing: RoutingReport | None = None

    @property
    def knows_nothing(self) -> bool:
        """Whether the checkpoint is no better than a model that finds every token equally likely."""
        return not math.isfinite(self.largest_difference) or self.kl >= self.kl_of_uniform

    def exact_within(self, limit: float) -> bool:
        """Return whether an exact conversion was read as it was written; routing that was fitted may differ."""
        routing = self.routing
        return self.largest_difference <= limit or (
            routing is not None and max(routing.largest_difference, routing.largest_router_difference) <= limit
        )

    def summary(self) -> str:
        """Return a sentence for people, without its full stop."""
        found = (
            f"largest difference {self.largest_difference:.1e} standard deviations, KL {self.kl:.4f}, "
            f"same top token {self.top1:.1%}"
        )
        if self.routing is None:
            return found
        return (
            f"{found}; {self.routing.exchanged_experts:.2%} of the experts are others, and with the source's experts "
            f"the largest difference is {self.routing.largest_difference:.1e}, of a router's logits "
            f"{self.routing.largest_router_difference:.1e}"
        )


@dataclass(frozen=True, eq=False)
class Spoken:
    """What a model said to each text: logits, and what its routers decided."""

    logits: Float[Tensor, "texts tokens vocab"]
    routing: Sequence[Sequence[Routing]]


@torch.inference_mode()
def speak(model: PreTrainedModel, tokens: Int[Tensor, "texts tokens"], *, like: Spoken | None = None) -> Spoken:
    """Run a model over texts, one after the other; ``like`` dictates the routing."""
    logits, routing = [], []
    for number, row in enumerate(tokens.split(1)):
        with recorded_routing(model, like.routing[number] if like else None) as seen:
            logits.append(model(input_ids=row.to(model.device), use_cache=False).logits.float())
        routing.append(seen)
    return Spoken(torch.cat(logits), routing)


def compare_with_source(
    source: Spoken, model: PreTrainedModel, tokens: Int[Tensor, "texts tokens"], shared: SharedTokens
) -> LogitsReport:
    """Compare a model with what its source said to the same texts, over the tokens that both have."""
    found = speak(model, tokens)
    wanted = shared.pick(source.logits)
    report = compare_logits(wanted, shared.pick(found.logits))
    pairs = _pairs(source, found)
    if not pairs:
        return report
    forced = speak(model, tokens, like=source)
    routing = RoutingReport(
        exchanged_experts=sum(theirs.exchanged(own) for theirs, own in pairs) / len(pairs),
        largest_difference=_largest_difference(wanted, shared.pick(forced.logits)),
        largest_router_difference=max(theirs.off(own) for theirs, own in _pairs(source, forced)),
    )
    return report.model_copy(update={"routing": routing})


def compare_logits(source: Float[Tensor, "... vocab"], other: Float[Tensor, "... vocab"]) -> LogitsReport:
    """Return how far logits are from the source's at the same positions."""
    wanted, found = (functional.log_softmax(logits, dim=-1).flatten(end_dim=-2) for logits in (source, other))
    entropy = -(wanted.exp() * wanted).sum(-1).mean().item()
    return LogitsReport(
        num_positions=len(wanted),
        largest_difference=_largest_difference(source, other),
        kl=(wanted.exp() * (wanted - found)).sum(-1).mean().item(),
        kl_of_uniform=math.log(source.shape[-1]) - entropy,
        top1=(wanted.argmax(-1) == found.argmax(-1)).float().mean().item(),
    )


def _largest_difference(source: Tensor, other: Tensor) -> float:
    return ((other - source).abs().max() / source.std()).item()


def _pairs(source: Spoken, other: Spoken) -> list[tuple[Routing, Routing]]:
    """Pair what both decided, where both have as many routers of as many experts."""
    pairs = [
        pair
        for wanted, found in zip(source.routing, other.routing, strict=True)
        if len(wanted) == len(found)
        for pair in zip(wanted, found, strict=True)
    ]
    same = all(wanted.logits.shape == found.logits.shape for wanted, found in pairs)
    return pairs if same else []
