"""What a cache of a few numbers costs, once every linear map that reads it is at its best.

A token caches ``F y``: ``y`` stacks the keys and values of all source heads, ``F`` holds the functionals, first those
of the rotary slots, then those of the latent. Heads read the cache by linear maps, so for given ``F`` the best maps are
regressions, and the cost that remains depends on ``F`` alone (variable projection, Golub and Pereyra 1973):

- **Keys.** At distance Δ head h multiplies its query with ``R_θ(Δ) k``. From the cache it can rebuild what the features
  ``[R_φ(Δ) κ, c, 1]`` predict of it, by one map for all distances: rotary and non-rotary parts are refitted together,
  and the source's frequencies θ and the slots' φ need not have anything in common. The 1 is there because the softmax
  does not see what all keys have in common. With ``T`` the second moment of keys and features, over tokens and
  distances, the cost is ``tr(E[q qᵀ] (T_kk − T_kf T_ff⁻¹ T_fk))``.
- **Values.** Head h puts out ``Σ_j p_ij v_j``, so what counts is the second moment of *pooled* tokens, and the cost is
  that of predicting pooled values from pooled latents, measured at the layer's output.

Tokens, distances and queries are taken as independent under the weights with which the moments were made. The source's
rotary pairs and the slots are interleaved here: (real, imaginary), (real, imaginary), …
"""

from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from transmla.linalg.hermitian import sqrt_and_inverse

# What the least tokens, and the least read of the cached numbers, count when the search scales its steps.
_TOKEN_SHARE = 1e-3
_ROW_SHARE = 0.05


class CacheCosts(NamedTuple):
    """What the errors in keys and in values cost: squared error of the layer's output, per token."""

    keys: Float[Tensor, ""]
    values: Float[Tensor, ""]


class CacheMaps(NamedTuple):
    """How each head reads the cache: keys ≈ ``slots`` κ rotated + ``key_up`` c, values ≈ ``value_up`` c."""

    slots: Float[Tensor, "heads head_dim rope"]
    key_up: Float[Tensor, "heads head_dim rank"]
    value_up: Float[Tensor, "heads head_dim rank"]


@dataclass(frozen=True, eq=False)
class CacheProblem:
    """The second moments that decide what a set of functionals costs.

    Attributes:
        keys: E[(y, 1) (y, 1)ᵀ] over tokens as errors in their logits count, for each key/value head.
        values: E[ȳ ȳᵀ] of the pooled tokens of each query head.
        queries: E[q qᵀ] of each head, times what a squared error in its logits costs.
        output_gram: W_Oᵀ W_O of each head.
        distances: distribution of the distance for each head.
        deltas: the distances, in tokens.
        pair_frequencies, slot_frequencies: of the source's pairs and of the slots, in radians per token.
        ridge: share of a feature's own energy that is added before it is inverted; what lies below it is rounding.
    """

    keys: Float[Tensor, "kv_heads joint1 joint1"]
    values: Float[Tensor, "heads joint joint"]
    queries: Float[Tensor, "heads head_dim head_dim"]
    output_gram: Float[Tensor, "heads head_dim head_dim"]
    distances: Float[Tensor, "heads distance"]
    deltas: Float[Tensor, " distance"]
    pair_frequencies: Float[Tensor, " pair"]
    slot_frequencies: Float[Tensor, " slot"]
    ridge: float = 1e-5

    @property
    def rope(self) -> int:
        """Functionals that belong to rotary slots."""
        return 2 * len(self.slot_frequencies)

    @cached_property
    def _turns(self) -> Float[Tensor, "2 rotating distance"]:
        """Cosine and sine of every rotating row at every distance; the key is Δ tokens *behind*, hence the sign."""
        frequencies = torch.cat([self.pair_frequencies, self.slot_frequencies]).repeat_interleave(2)
        angle = frequencies.to(self.deltas).unsqueeze(-1) * self.deltas
        return torch.stack([angle.cos(), -angle.sin()])

    @cached_property
    def _turned_together(self) -> Float[Tensor, "heads 2 2 rotating rotating"]:
        """E_Δ of the products of two rows' cosines and sines, for each head."""
        return torch.einsum("hd,pad,qbd->hpqab", self.distances, self._turns, self._turns)

    @cached_property
    def _turned(self) -> Float[Tensor, "heads 2 rotating"]:
        """E_Δ of the rows' cosines and sines, for each head."""
        return torch.einsum("hd,pad->hpa", self.distances, self._turns)

    @cached_property
    def _group(self) -> Int[Tensor, " heads"]:
        """The key/value head of each query head."""
        heads = torch.arange(len(self.queries), device=self.queries.device)
        return heads // (len(self.queries) // len(self.keys))

    @cached_property
    def _own_keys(self) -> Float[Tensor, "kv_heads 2 2 head_dim head_dim"]:
        """Moment of each head's own keys, as they are and after a quarter turn: no functional changes it."""
        own = self._own_key_columns(self._own_key_columns(self.keys).mT).mT
        return self._with_quarter_turn(self._with_quarter_turn(own).mT).mT

    @cached_property
    def _own_values(self) -> Float[Tensor, "heads head_dim head_dim"]:
        return self._own_value_rows(self._own_value_rows(self.values).mT).mT

    def _own_key_columns(self, products: Float[Tensor, "kv_heads *rows joint1"]) -> Float[Tensor, "kv_heads *rows d"]:
        kv_heads, head_dim = len(self.keys), self.queries.shape[1]
        every = products[..., : kv_heads * head_dim].unflatten(-1, (kv_heads, head_dim))
        return every.diagonal(dim1=0, dim2=-2).movedim(-1, 0)

    def _own_value_rows(self, products: Float[Tensor, "heads joint columns"]) -> Float[Tensor, "heads d columns"]:
        kv_heads, head_dim = len(self.keys), self.queries.shape[1]
        every = products[:, kv_heads * head_dim :].unflatten(1, (kv_heads, head_dim))
        return every[torch.arange(len(every), device=every.device), self._group]

    @staticmethod
    def _with_quarter_turn(rows: Float[Tensor, "*batch rows columns"]) -> Float[Tensor, "*batch 2 rows columns"]:
        return torch.stack([rows, quarter_turn(rows)], dim=-3)

    def _key_moment(self, functionals: Float[Tensor, "cached joint"]) -> Float[Tensor, "heads features features"]:
        """Return the moment of [k, κ, c, 1], the first two rotated, averaged over tokens and distances."""
        slots, latent = functionals.split([self.rope, len(functionals) - self.rope])
        slots = torch.nn.functional.pad(self._with_quarter_turn(slots), (0, 1))
        resting = torch.block_diag(latent, latent.new_ones(1, 1))
        # The only products with whole moments; all that follows is small.
        by_slot = torch.einsum("psi,gij->gpsj", slots, self.keys)
        by_resting = torch.einsum("ai,gij->gaj", resting, self.keys)

        own_slot = self._with_quarter_turn(self._own_key_columns(by_slot).mT)
        slot_own = own_slot.mT
        slot_slot = torch.einsum("gpsj,qtj->gpqst", by_slot, slots)
        both = torch.cat(
            [torch.cat([self._own_keys, own_slot.transpose(1, 2)], dim=-1), torch.cat([slot_own, slot_slot], dim=-1)],
            dim=-2,
        )
        own_resting = self._with_quarter_turn(self._own_key_columns(by_resting).mT)
        across = torch.cat([own_resting, torch.einsum("gpsj,bj->gpsb", by_slot, resting)], dim=-2)
        still = (by_resting @ resting.mT)[self._group]
        turning = (self._turned_together * both[self._group]).sum((1, 2))
        crossing = (self._turned.unsqueeze(-1) * across[self._group]).sum(1)
        return torch.cat([torch.cat([turning, crossing], dim=2), torch.cat([crossing.mT, still], dim=2)], dim=1)

    def _regress_keys(self, functionals: Tensor) -> tuple[Tensor, Tensor]:
        head_dim = self.queries.shape[1]
        moment = self._key_moment(functionals)
        own, features = moment[:, :head_dim], moment[:, head_dim:]
        return _regress(own[..., :head_dim], own[..., head_dim:], features[..., head_dim:], self.ridge)

    def _regress_values(self, functionals: Tensor) -> tuple[Tensor, Tensor]:
        latent = functionals[self.rope :]
        pooled = self.values @ latent.mT
        return _regress(self._own_values, self._own_value_rows(pooled), latent @ pooled, self.ridge)

    def costs(self, functionals: Float[Tensor, "cached joint"]) -> CacheCosts:
        """Return what the errors in keys and those in values cost, each by itself."""
        (_, keys), (_, values) = self._regress_keys(functionals), self._regress_values(functionals)
        return CacheCosts((keys * self.queries).sum(), (values * self.output_gram).sum())

    def cost(self, functionals: Float[Tensor, "cached joint"]) -> Float[Tensor, ""]:
        """Return both costs together, at par: what the search lowers."""
        keys, values = self.costs(functionals)
        return keys + values

    def maps(self, functionals: Float[Tensor, "cached joint"]) -> CacheMaps:
        """Return each head's best way to read the cache."""
        (keys, _), (values, _) = self._regress_keys(functionals), self._regress_values(functionals)
        return CacheMaps(keys[..., : self.rope], keys[..., self.rope : -1], values)

    def refine(self, functionals: Float[Tensor, "cached joint"], *, steps: int) -> Float[Tensor, "cached joint"]:
        """Lower the cost by L-BFGS, starting from ``functionals``; it never ends higher than it began.

        For given maps U the cost is quadratic in the functionals, with about UᵀU in the metric of the errors on one
        side and the moment of the tokens on the other. In coordinates in which both are near one, a step is nearly
        Newton's: a dozen go further than fifty in the plain ones (scaled gradients, Tong et al. 2021).
        """
        first = self.cost(functionals)
        # Where no more is lost than what the ridge takes, there is nothing to gain but rounding.
        if steps == 0 or first <= 2 * self.ridge * self.cost(torch.zeros_like(functionals)):
            return functionals
        keys, values = self.keys[:, :-1, :-1].mean(0), self.values.mean(0)
        tiny = torch.finfo(functionals.dtype).tiny
        energies = keys.trace().clamp_min(tiny), values.trace().clamp_min(tiny)
        whiten, colour = sqrt_and_inverse(keys / energies[0] + values / energies[1], share=_TOKEN_SHARE)
        white = self._of_unit_length(functionals @ whiten)
        weigh, unweigh = sqrt_and_inverse(self._weight_of_rows(white @ colour, energies), share=_ROW_SHARE)
        free = (weigh @ white).requires_grad_()
        optimizer = torch.optim.LBFGS(
            [free], max_iter=steps, max_eval=2 * steps, history_size=20, line_search_fn="strong_wolfe"
        )

        def relative_cost() -> Tensor:
            optimizer.zero_grad()
            cost = self.cost(unweigh @ free @ colour) / first
            cost.backward()
            return cost

        with torch.enable_grad():
            optimizer.step(relative_cost)
        refined = self._of_unit_length(unweigh @ free.detach()) @ colour
        return refined if self.cost(refined) < first else functionals

    def _of_unit_length(self, white: Float[Tensor, "cached joint"]) -> Float[Tensor, "cached joint"]:
        """Scale the functionals, which changes nothing; the two of a slot alike, for they are one complex number."""
        slots, latent = white.tensor_split([self.rope])
        slots = torch.nn.functional.normalize(slots.unflatten(0, (-1, 2)).flatten(1), dim=1).reshape(slots.shape)
        return torch.cat([slots * 2**0.5, torch.nn.functional.normalize(latent, dim=1)])

    def _weight_of_rows(
        self, functionals: Float[Tensor, "cached joint"], energies: tuple[Tensor, Tensor]
    ) -> Float[Tensor, "cached cached"]:
        """Return what an error in each cached number costs, on average over tokens of these energies."""
        maps = self.maps(functionals)

        def weight(read: Tensor, metric: Tensor, energy: Tensor) -> Tensor:
            return (read.mT @ metric @ read).sum(0) * energy

        latent = weight(maps.key_up, self.queries, energies[0]) + weight(maps.value_up, self.output_gram, energies[1])
        return torch.block_diag(weight(maps.slots, self.queries, energies[0]), latent)


def quarter_turn(rows: Float[Tensor, "*batch rows columns"]) -> Float[Tensor, "*batch rows columns"]:
    """Multiply interleaved complex rows by i: (real, imaginary) becomes (−imaginary, real)."""
    pairs = rows.unflatten(-2, (-1, 2))
    return torch.stack([-pairs[..., 1, :], pairs[..., 0, :]], dim=-2).flatten(-3, -2)


def _regress(own: Tensor, cross: Tensor, features: Tensor, ridge: float) -> tuple[Tensor, Tensor]:
    """Return the best map, cross features⁻¹, and the moment of what it leaves of ``own``.

    The map is a constant to autograd: at its best, what it leaves does not change with it (the envelope theorem), so
    nothing has to go back through the factorisation.
    """
    diagonal = features.diagonal(dim1=-2, dim2=-1)
    # A feature that is always zero has no energy of its own: a little of the others' keeps the root real.
    added = ridge * (diagonal + 1e-2 * diagonal.mean(-1, keepdim=True)) + torch.finfo(diagonal.dtype).tiny
    features = features + torch.diag_embed(added)
    with torch.no_grad():
        best = torch.cholesky_solve(cross.mT, torch.linalg.cholesky(features)).mT
    explained = best @ cross.mT
    return best, own - explained - explained.mT + best @ features @ best.mT
