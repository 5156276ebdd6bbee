"""Stage 0: what the layer's inputs, tokens, distances and heads look like, as second moments.

Only sums survive a batch: memory does not grow with the calibration text. Products run in float32, sums in float64.
"""

from dataclasses import dataclass

import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor

from transmla.arch.spec import AttentionSpec
from transmla.calibration.stream import Attended
from transmla.linalg.attention import attention_sums
from transmla.linalg.rotary import rotate

# Attention probabilities held at once, in elements, unless one window has more: pieces that fit a CPU's cache are a
# quarter faster than whole batches, and memory stays small.
_MAX_PROBABILITIES = 2**21


@dataclass(frozen=True, eq=False)
class AttentionWeights:
    """The four projections of a source attention layer, one axis a head.

    Attributes:
        query: W_Q of each query head.
        key, value: W_K and W_V of each key/value head.
        output: W_O of each query head.
    """

    query: Float[Tensor, "heads head_dim hidden"]
    key: Float[Tensor, "kv_heads head_dim hidden"]
    value: Float[Tensor, "kv_heads head_dim hidden"]
    output: Float[Tensor, "heads hidden head_dim"]

    @classmethod
    def from_projections(
        cls,
        spec: AttentionSpec,
        *,
        q_proj: Float[Tensor, "queries hidden"],
        k_proj: Float[Tensor, "keys hidden"],
        v_proj: Float[Tensor, "keys hidden"],
        o_proj: Float[Tensor, "hidden queries"],
    ) -> "AttentionWeights":
        """Cut the matrices of ``nn.Linear`` into heads."""
        return cls(
            query=q_proj.unflatten(0, (spec.num_attention_heads, spec.head_dim)),
            key=k_proj.unflatten(0, (spec.num_key_value_heads, spec.head_dim)),
            value=v_proj.unflatten(0, (spec.num_key_value_heads, spec.head_dim)),
            output=rearrange(o_proj, "hidden (heads d) -> heads hidden d", heads=spec.num_attention_heads),
        )

    @property
    def output_gram(self) -> Float[Tensor, "heads head_dim head_dim"]:
        """W_O^hᵀ W_O^h: the length of what a head adds to the residual stream."""
        return self.output.mT @ self.output


@dataclass(frozen=True, eq=False)
class Moments:
    """Second moments of one layer, in float64 (ALGORITHM.md, stage 0).

    Attributes:
        uniform: E[x xᵀ] over all tokens: how queries are distributed.
        attended: E[x xᵀ] over tokens weighted by the squared attention they receive: keys and values.
        distances: distribution of the distance between query and key, weighted by what an error there would cost.
        mass: E_i[Σ_j p_h(i, j)²]: what one unit of error in the head's values costs at the output.
        spread: E_i[Σ_j p_h(i, j)² ‖W_O^h (v_j − o_i)‖²]: what one unit of error in its logits costs there.
    """

    uniform: Float[Tensor, "hidden hidden"]
    attended: Float[Tensor, "hidden hidden"]
    distances: Float[Tensor, "heads distance"]
    mass: Float[Tensor, " heads"]
    spread: Float[Tensor, " heads"]

    @classmethod
    def from_weights(cls, weights: AttentionWeights, *, window: int) -> "Moments":
        """Assume white inputs and distances that are uniform in their logarithm: for conversion without data."""
        heads, _, hidden = weights.query.shape
        device = weights.query.device
        value = weights.value.double().repeat_interleave(heads // weights.value.shape[0], dim=0)
        gram = weights.output_gram.double()
        distances = 1 / torch.arange(1, window + 1, dtype=torch.float64, device=device)
        return cls(
            uniform=torch.eye(hidden, dtype=torch.float64, device=device),
            attended=torch.eye(hidden, dtype=torch.float64, device=device),
            distances=(distances / distances.sum()).expand(heads, window),
            mass=torch.ones(heads, dtype=torch.float64, device=device),
            spread=(gram @ value @ value.mT).diagonal(dim1=-2, dim2=-1).sum(-1),
        )


class MomentSums:
    """Adds up the moments of one layer, batch by batch."""

    def __init__(
        self, output_gram: Float[Tensor, "heads head_dim head_dim"], spec: AttentionSpec, *, tokens: int
    ) -> None:
        """Start from nothing, for windows of ``tokens`` tokens and heads with these Gram matrices W_Oᵀ W_O."""
        self._gram, self._spec = output_gram, spec
        heads, hidden, device = spec.num_attention_heads, spec.hidden_size, output_gram.device
        self._uniform = torch.zeros(hidden, hidden, dtype=torch.float64, device=device)
        self._attended = torch.zeros_like(self._uniform)
        self._mass = torch.zeros(heads, dtype=torch.float64, device=device)
        self._cost = torch.zeros(heads, tokens, dtype=torch.float64, device=device)
        self._count = 0

    def add(self, attended: Attended) -> None:
        """Add what a batch of windows did."""
        _, tokens, _ = attended.input.shape
        piece = max(1, _MAX_PROBABILITIES // (self._spec.num_attention_heads * tokens**2))
        projections = (x.float().split(piece) for x in (attended.query, attended.key, attended.value))
        received = torch.cat([self._attend(*part) for part in zip(*projections, strict=True)])
        rows = attended.input.float().flatten(0, 1)
        weighted = rows * received.flatten().sqrt().unsqueeze(-1)
        self._uniform += rows.T @ rows
        self._attended += weighted.T @ weighted
        self._count += len(rows)

    def _attend(
        self,
        query: Float[Tensor, "batch tokens queries"],
        key: Float[Tensor, "batch tokens keys"],
        value: Float[Tensor, "batch tokens keys"],
    ) -> Float[Tensor, "batch tokens"]:
        """Add what the heads do, and return the squared attention that each token receives."""
        spec = self._spec
        query, key, value = (rearrange(x, "b t (h d) -> b h t d", d=spec.head_dim) for x in (query, key, value))
        sums = attention_sums(
            rotate(query, spec.frequencies),
            rotate(key, spec.frequencies).repeat_interleave(spec.num_key_value_groups, dim=1),
            value.repeat_interleave(spec.num_key_value_groups, dim=1),
            self._gram,
            scale=spec.head_dim**-0.5,
        )
        self._mass += sums.mass
        self._cost += sums.cost
        return sums.token

    def finish(self) -> Moments:
        """Turn the sums into moments."""
        spread = self._cost.sum(-1, keepdim=True)
        # A head that puts out nothing at any distance has no errors to weigh: count all its distances alike.
        distances = torch.where(spread > 0, self._cost / spread, 1 / self._cost.shape[1])
        return Moments(
            uniform=self._uniform / self._count,
            attended=self._attended / self._mass.sum(),
            distances=distances,
            mass=self._mass / self._count,
            spread=spread.squeeze(-1) / self._count,
        )
