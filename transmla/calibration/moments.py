"""What the layer's inputs, tokens, distances and heads look like, as second moments.

See docs/concepts/algorithm.md, "Moments".

Only sums survive a batch: memory does not grow with the calibration text. Products run in float32, sums over batches in
float64.

What attention *should* do is the source's affair, on the source's own inputs; what the converted layer will read is
what the converted layers below it put out. So a batch comes with both, and the moments of keys and values are those of
the converted inputs (docs/concepts/algorithm.md, "Error feedback").
"""

from dataclasses import dataclass
from functools import partial

import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor

from transmla.arch.spec import AttentionSpec
from transmla.calibration.stream import Attended
from transmla.linalg.attention import AttentionSums, attention_sums
from transmla.linalg.hermitian import clamp_psd
from transmla.linalg.rotary import interleave, rotate, to_pairs

# Attention probabilities held at once, in elements, unless one window has more: pieces that fit a CPU's cache are a
# quarter faster than whole batches, and memory stays small.
_MAX_PROBABILITIES = 2**21

# Queries between two whose pooled tokens are counted.
_STRIDE = 4

# Share of single tokens in the moment of pooled ones: a head that attends to one token alone still needs a full moment.
_SINGLE_TOKENS = 0.05


@dataclass(frozen=True, eq=False)
class AttentionWeights:
    """The four projections of a source attention layer, one axis a head.

    Where queries and keys have biases, the layer input has a last entry of one (see
    :class:`~transmla.calibration.stream.ResidualStream`), and *hidden* counts it.

    Attributes:
        query: W_Q of each query head.
        key, value: W_K and W_V of each key/value head.
        output: W_O of each query head.
        output_bias: what the layer puts out for no tokens at all.
    """

    query: Float[Tensor, "heads head_dim hidden"]
    key: Float[Tensor, "kv_heads head_dim hidden"]
    value: Float[Tensor, "kv_heads head_dim hidden"]
    output: Float[Tensor, "heads hidden0 head_dim"]
    output_bias: Float[Tensor, " hidden0"] | None = None

    @classmethod
    def from_projections(
        cls,
        spec: AttentionSpec,
        *,
        q_proj: Float[Tensor, "queries hidden"],
        k_proj: Float[Tensor, "keys hidden"],
        v_proj: Float[Tensor, "keys hidden"],
        o_proj: Float[Tensor, "hidden0 queries"],
        output_bias: Float[Tensor, " hidden0"] | None = None,
    ) -> "AttentionWeights":
        """Cut the matrices of ``nn.Linear`` into heads."""
        return cls(
            query=q_proj.unflatten(0, (spec.num_attention_heads, spec.head_dim)),
            key=k_proj.unflatten(0, (spec.num_key_value_heads, spec.head_dim)),
            value=v_proj.unflatten(0, (spec.num_key_value_heads, spec.head_dim)),
            output=rearrange(o_proj, "hidden (heads d) -> heads hidden d", heads=spec.num_attention_heads),
            output_bias=output_bias,
        )

    @property
    def output_gram(self) -> Float[Tensor, "heads head_dim head_dim"]:
        """W_O^hᵀ W_O^h: the length of what a head adds to the residual stream."""
        return self.output.mT @ self.output

    @property
    def joint(self) -> Float[Tensor, "joint hidden"]:
        """What a cache holds: keys, their rotary pairs interleaved, then values, of all heads."""
        return torch.cat([interleave(to_pairs(self.key)), self.value]).flatten(0, 1)


@dataclass(frozen=True, eq=False)
class Moments:
    """Second moments of one layer, in float64 (docs/concepts/algorithm.md, "Moments").

    Attributes:
        uniform: E[x xᵀ] over all tokens: how queries are distributed.
        attended: E[x xᵀ] over tokens weighted by the squared attention they receive: keys and values.
        distances: distribution of the distance between query and key, weighted by what an error there would cost.
        mass: E_i[Σ_j p_h(i, j)²]: what one unit of error in the head's values costs at the output.
        spread: E_i[Σ_j p_h(i, j)² ‖W_O^h (v_j − o_i)‖²]: what one unit of error in its logits costs there.
        keys: E[(y, 1) (y, 1)ᵀ] of the stacked keys and values y, over tokens weighted by what an error in the logits of
            their key/value head would cost.
        values: E_i[ȳ_h ȳ_hᵀ], ȳ_h = Σ_j p_h(i, j) y_j: what a head pools. An error that all tokens share adds up.
        queries: E[q qᵀ] of each head, pairs interleaved, over queries weighted alike, and times ``spread``.
    """

    uniform: Float[Tensor, "hidden hidden"]
    attended: Float[Tensor, "hidden hidden"]
    distances: Float[Tensor, "heads distance"]
    mass: Float[Tensor, " heads"]
    spread: Float[Tensor, " heads"]
    keys: Float[Tensor, "kv_heads joint1 joint1"]
    values: Float[Tensor, "heads joint joint"]
    queries: Float[Tensor, "heads head_dim head_dim"]

    @classmethod
    def from_weights(cls, weights: AttentionWeights, *, window: int) -> "Moments":
        """Assume white inputs and distances that are uniform in their logarithm: for conversion without data."""
        heads, _, hidden = weights.query.shape
        device = weights.query.device
        value = weights.value.double().repeat_interleave(heads // weights.value.shape[0], dim=0)
        gram = weights.output_gram.double()
        distances = 1 / torch.arange(1, window + 1, dtype=torch.float64, device=device)
        spread = (gram @ value @ value.mT).diagonal(dim1=-2, dim2=-1).sum(-1)
        query = interleave(to_pairs(weights.query.double()))
        joint = weights.joint.double() @ weights.joint.double().T
        kv_heads = len(weights.key)
        return cls(
            uniform=torch.eye(hidden, dtype=torch.float64, device=device),
            attended=torch.eye(hidden, dtype=torch.float64, device=device),
            distances=(distances / distances.sum()).expand(heads, window),
            mass=torch.ones(heads, dtype=torch.float64, device=device),
            spread=spread,
            keys=torch.block_diag(joint, joint.new_ones(1, 1)).expand(kv_heads, -1, -1),
            values=joint.expand(heads, -1, -1),
            queries=query @ query.mT * spread[:, None, None],
        )


class MomentSums:
    """Adds up the moments of one layer, batch by batch."""

    def __init__(self, weights: AttentionWeights, spec: AttentionSpec, *, tokens: int) -> None:
        """Start from nothing, for windows of ``tokens`` tokens and the attention with these weights."""
        self._gram, self._joint, self._spec = weights.output_gram, weights.joint, spec
        heads, kv_heads, head_dim = spec.num_attention_heads, spec.num_key_value_heads, spec.head_dim
        joint, hidden = self._joint.shape
        zeros = partial(torch.zeros, dtype=torch.float64, device=self._gram.device)
        self._uniform, self._attended = zeros(hidden, hidden), zeros(hidden, hidden)
        self._mass, self._cost = zeros(heads), zeros(heads, tokens)
        self._keys = zeros(kv_heads, joint + 1, joint + 1)
        self._values = zeros(heads, joint, joint)
        self._queries = zeros(heads, head_dim, head_dim)
        self._count = self._pooled = 0

    def add(self, attended: Attended, inputs: Float[Tensor, "batch tokens hidden"] | None = None) -> None:
        """Add what a batch of windows did in the source, and the inputs that the converted layer has in its place.

        Without ``inputs`` they are the source's.
        """
        tokens = attended.input.shape[1]
        inputs = (attended.input if inputs is None else inputs).float()
        piece = max(1, _MAX_PROBABILITIES // (self._spec.num_attention_heads * tokens**2))
        query = attended.query * self._spec.logit_scale
        rows = (x.float().split(piece) for x in (query, attended.key, attended.value, inputs))
        # Adding to a float64 sum takes as long as the product that is added, so it is done once a batch.
        values = torch.zeros_like(self._values, dtype=torch.float32)
        received = torch.cat([self._attend(values, *part) for part in zip(*rows, strict=True)])
        self._values += values
        flat = inputs.flatten(0, 1)
        self._uniform += flat.T @ flat
        self._attended += _weighted_gram(flat, received.flatten())
        self._count += len(flat)

    def _attend(
        self,
        values: Float[Tensor, "heads joint joint"],
        query: Float[Tensor, "batch tokens queries"],
        key: Float[Tensor, "batch tokens keys"],
        value: Float[Tensor, "batch tokens keys"],
        inputs: Float[Tensor, "batch tokens hidden"],
    ) -> Float[Tensor, "batch tokens"]:
        """Add what the heads do, what they pool to ``values``; return the squared attention each token receives."""
        spec = self._spec
        query, key, value = (rearrange(x, "b t (h d) -> b h t d", d=spec.head_dim) for x in (query, key, value))
        joint = inputs @ self._joint.T
        sums = sums_of_heads(spec, query, key, value, self._gram, joint, stride=_STRIDE)
        self._mass += sums.mass
        self._cost += sums.cost
        by_group = rearrange(sums.key_cost, "b (g q) t -> g (b t) q", g=spec.num_key_value_heads).sum(-1)
        self._keys += _weighted_gram(torch.nn.functional.pad(joint, (0, 1), value=1.0).flatten(0, 1), by_group)
        by_head = rearrange(interleave(to_pairs(query.mT)).mT, "b h t d -> h (b t) d")
        self._queries += _weighted_gram(by_head, rearrange(sums.query_cost, "b h t -> h (b t)"))
        pooled = rearrange(sums.pooled, "b h t j -> h (b t) j")
        values.baddbmm_(pooled.mT, pooled)
        self._pooled += pooled.shape[1]
        return sums.token

    def finish(self) -> Moments:
        """Turn the sums into moments."""
        spread = self._cost.sum(-1, keepdim=True)
        # A head that puts out nothing at any distance has no errors to weigh: count all its distances alike.
        distances = torch.where(spread > 0, self._cost / spread, 1 / self._cost.shape[1])
        attended, mass, joint = self._attended / self._mass.sum(), self._mass / self._count, self._joint.double()
        single = joint @ attended @ joint.T * mass[:, None, None]
        total = rearrange(spread, "(g q) 1 -> g q", g=len(self._keys)).sum(-1)
        return Moments(
            uniform=self._uniform / self._count,
            attended=attended,
            distances=distances,
            mass=mass,
            spread=spread.squeeze(-1) / self._count,
            keys=clamp_psd(self._keys / total[:, None, None].clamp_min(torch.finfo(total.dtype).tiny)),
            values=clamp_psd(self._values / self._pooled + _SINGLE_TOKENS * single),
            queries=self._queries / self._count,
        )


def sums_of_heads(
    spec: AttentionSpec,
    query: Float[Tensor, "batch heads tokens head_dim"],
    key: Float[Tensor, "batch kv_heads tokens head_dim"],
    value: Float[Tensor, "batch kv_heads tokens head_dim"],
    output_gram: Float[Tensor, "heads head_dim head_dim"],
    joint: Float[Tensor, "batch tokens joint"],
    *,
    stride: int,
) -> AttentionSums:
    """Run the source's attention on queries and keys before RoPE; see :func:`attention_sums`."""
    return attention_sums(
        rotate(query, spec.frequencies),
        rotate(key, spec.frequencies).repeat_interleave(spec.num_key_value_groups, dim=1),
        value.repeat_interleave(spec.num_key_value_groups, dim=1),
        output_gram,
        joint,
        scale=spec.head_dim**-0.5,
        stride=stride,
    )


def _weighted_gram(rows: Float[Tensor, "*batch tokens n"], weight: Float[Tensor, "*out tokens"]) -> Tensor:
    """Return Σ weight · row rowᵀ over the tokens."""
    weighted = rows * weight.sqrt().unsqueeze(-1)
    return weighted.mT @ weighted
