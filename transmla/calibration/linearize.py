"""Projections that are not linear in the layer's input, as the linear maps that come nearest to them.

MLA has nothing between the layer input and queries, keys and values but matrices, and many an engine no biases on them.
Two things of some sources are in the way, and both are met by one regression on what the layer really is given:

- *QK-norm* (Qwen3): y = γ ⊙ W x / rms(W x), head by head;
- *biases* (Qwen2), where they are not kept: y = W x + b. Trained models have directions that all tokens share, so some
  functional u·x is nearly 1, and the regression is W + b uᵀ with the best such u.

See docs/concepts/algorithm.md, "Biases and norms".

It starts from the crude answer, one factor for each number of y, and adds what the text supports. A token counts by
what an error in its query, key or value would cost at the layer's output: the logit metric.
"""

from collections.abc import Iterable, Iterator, Mapping

import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor

from transmla.arch.spec import AttentionSpec
from transmla.calibration.moments import sums_of_heads

#: The projections of attention that may be other than linear, in the order of what attention does with them.
PROJECTIONS = ("q_proj", "k_proj", "v_proj")

# Pull towards the crude answer, or towards zero, as a share of the mean square of an input.
_RIDGE = 1e-6
# What every token counts, as a share of the mean one.
_ANY_TOKEN = 0.05


@torch.no_grad()
def token_costs(
    spec: AttentionSpec,
    seen: Iterable[tuple[Float[Tensor, "_ _ hidden"], Mapping[str, Float[Tensor, "_ _ _"]]]],
    output_gram: Float[Tensor, "heads head_dim head_dim"],
) -> Iterator[dict[str, Float[Tensor, "_ _"]]]:
    """Yield, batch by batch, what an error in each token's query, key and value costs, all heads together.

    Args:
        spec: of the source.
        seen: inputs, and what the projections made of them, in the source itself.
        output_gram: W_Oᵀ W_O of each head.
    """
    for inputs, made in seen:
        query, key, value = (
            rearrange(made[name].float(), "b t (h d) -> b h t d", d=spec.head_dim) for name in PROJECTIONS
        )
        windows = zip(query * spec.logit_scale, key, value, inputs.float(), strict=True)
        parts = [
            sums_of_heads(spec, q[None], k[None], v[None], output_gram, x[None, :, :1], stride=len(x))
            for q, k, v, x in windows
        ]
        costs = (
            torch.cat([part.query_cost.sum(1) for part in parts]),
            torch.cat([part.key_cost.sum(1) for part in parts]),
            torch.cat([part.token for part in parts]),
        )
        # Where no error costs anything, all tokens count alike.
        yield {
            name: cost + (_ANY_TOKEN * cost.mean()).clamp_min(1e-30)
            for name, cost in zip(PROJECTIONS, costs, strict=True)
        }


@torch.no_grad()
def nearest_linear(
    seen: Iterable[tuple[Float[Tensor, "_ _ hidden"], Mapping[str, Float[Tensor, "_ _ _"]]]],
    costs: Iterable[Mapping[str, Float[Tensor, "_ _"]]],
    weights: Mapping[str, Float[Tensor, "_ hidden"]],
    *,
    ridge: float = _RIDGE,
) -> dict[str, Float[Tensor, "_ hidden"]]:
    """Return for each projection the matrix B that minimizes E[w ‖y − B x‖²].

    Args:
        seen: batches of inputs x, and what each projection made of them, y.
        costs: what an error in y counts at each token, w, batch by batch.
        weights: W of each projection.
        ridge: pull towards W with one factor for each number of y; infinite for nothing else.
    """
    tiny = torch.finfo(torch.float32).tiny
    moments = {name: weight.new_zeros(weight.shape[1], weight.shape[1]).double() for name, weight in weights.items()}
    cross = {name: torch.zeros_like(weight, dtype=torch.float64) for name, weight in weights.items()}
    total = dict.fromkeys(weights, 0.0)
    for (inputs, outputs), cost in zip(seen, costs, strict=True):
        flat = inputs.float().flatten(0, 1)
        for name in weights:
            root = cost[name].flatten().sqrt().unsqueeze(-1)
            weighted = flat * root
            moments[name] += weighted.mT @ weighted
            cross[name] += (outputs[name].float().flatten(0, 1) * root).mT @ weighted
            total[name] += cost[name].sum().item()
    found = {}
    for name, weight in weights.items():
        moment, wanted, plain = moments[name] / total[name], cross[name] / total[name], weight.double()
        pulled = moment + (ridge * moment.diagonal().mean() + tiny) * torch.eye(len(moment)).to(moment)
        size = (plain @ moment * plain).sum(-1, keepdim=True)
        crude = plain * ((wanted * plain).sum(-1, keepdim=True) / size.clamp_min(tiny))
        found[name] = (crude + torch.linalg.solve(pulled, (wanted - crude @ moment).mT).mT).to(weight)
    return found
