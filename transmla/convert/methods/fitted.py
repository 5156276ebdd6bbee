"""Our method: what the cache holds, and every head's way to read it, are fitted to the layer's output.

See docs/concepts/algorithm.md, "Slots and latent from eigenvectors", then docs/concepts/algorithm.md, "Variable
projection", and docs/concepts/algorithm.md, "Error feedback".
"""

from collections.abc import Sequence

import torch
from jaxtyping import Float64
from pydantic import Field
from torch import Tensor

from transmla.calibration.moments import AttentionWeights, Moments
from transmla.convert.latent_attention import LatentAttention
from transmla.convert.methods.base import ConvertedLayer, LayerGoal, Method, MethodOptions, PredictedCost
from transmla.convert.methods.steps import in_float64, pair_covariance, per_group
from transmla.linalg.hermitian import sqrt_psd
from transmla.linalg.low_rank import low_rank, pad
from transmla.linalg.mixing import mix_heads, rotation_error
from transmla.linalg.rotary import as_real, expected_rotation, interleave, long_tail, to_pairs
from transmla.linalg.variable_projection import CacheProblem

# Steps of L-BFGS from the eigenvectors to the least predicted cost, fewer where sizes are only compared, and what
# distances beyond the windows count.
REFINE_STEPS = 12
_PREDICT_STEPS = 4
_TAIL = 0.03


class FittedOptions(MethodOptions):
    """What can be switched off, to see what it is worth."""

    refine_steps: int = Field(REFINE_STEPS, ge=0, description="Steps towards the least predicted cost.")
    ridge: float = Field(1e-5, ge=0, description="Pull of the regressions by which heads read the cache.")
    error_feedback: bool = Field(True, description="Fit each layer on what the converted layers below output.")
    refit: bool = Field(True, description="Refit the output projection there.")


class Fitted(Method):
    """Attention-weighted, in the metric of the layer's output, with error feedback."""

    name = "fitted"
    title = "fitted"
    options_type = FittedOptions
    repeats = 0.33
    takes_freq_fold = True
    searches = True
    predicts = True

    options: FittedOptions

    @property
    def learns_on_converted(self) -> bool:
        """Whether error feedback is on."""
        return self.options.error_feedback

    @property
    def refits(self) -> bool:
        """Whether the refit is on, too."""
        return self.options.error_feedback and self.options.refit

    def choose_folds(self, folds: Sequence[int]) -> tuple[int, ...]:
        """Return all: the best is chosen per layer."""
        return tuple(folds)

    def convert(self, weights: AttentionWeights, moments: Moments | None, goal: LayerGoal) -> ConvertedLayer:
        """Choose what the cache holds, and how every head reads it, by what an error would do to the layer's output.

        The functionals start from complex mixing of the heads and the joint latent of what remains. From there all of
        them move together to the least predicted cost, and each head's maps are the regression on them, see
        :mod:`transmla.linalg.variable_projection`.
        """
        assert moments is not None
        weights = in_float64(weights)
        problem = _cache_problem(weights, moments, goal, self.options.ridge)
        start, fold = _start(weights, moments, goal)
        functionals = problem.refine(start, steps=self.options.refine_steps)
        maps = problem.maps(functionals)
        slots, latent = (functionals @ weights.joint).tensor_split([problem.rope])
        query = interleave(to_pairs(weights.query))
        attention = LatentAttention(
            query_nope=query,
            query_rope=maps.slots.mT @ query,
            latent=latent,
            key_rope=slots,
            key_up=maps.key_up,
            value_up=maps.value_up,
            output=weights.output,
            output_bias=weights.output_bias,
            softmax_scale=weights.key.shape[1] ** -0.5,
        )
        return ConvertedLayer(attention, fold)

    def predict(self, weights: AttentionWeights, moments: Moments, goal: LayerGoal) -> PredictedCost:
        """Predict the error of the layer that :meth:`convert` would make, after fewer steps."""
        weights = in_float64(weights)
        problem = _cache_problem(weights, moments, goal, self.options.ridge)
        start, _ = _start(weights, moments, goal)
        found = problem.refine(start, steps=min(_PREDICT_STEPS, self.options.refine_steps))
        return PredictedCost(*(cost.item() for cost in problem.costs(found)))


def _cache_problem(weights: AttentionWeights, moments: Moments, goal: LayerGoal, ridge: float) -> CacheProblem:
    distances, deltas = long_tail(moments.distances, context=goal.context, share=_TAIL)
    return CacheProblem(
        keys=moments.keys,
        values=moments.values,
        queries=moments.queries / weights.key.shape[1],
        output_gram=weights.output_gram,
        distances=distances,
        deltas=deltas,
        pair_frequencies=goal.pair_frequencies,
        slot_frequencies=goal.slot_frequencies,
        ridge=ridge,
    )


def _start(weights: AttentionWeights, moments: Moments, goal: LayerGoal) -> tuple[Float64[Tensor, "cached joint"], int]:
    """Return functionals of the stacked keys and values from eigenvectors alone, and the best fold."""
    query, key = to_pairs(weights.query), to_pairs(weights.key)
    kv_heads = len(key)
    covariance = pair_covariance(key, moments.attended)
    # An error in a logit of head h costs spread_h at the layer's output.
    query_moment = (query @ moments.uniform.to(query.dtype) @ query.mH) * moments.spread[:, None, None]
    metric = per_group(query_moment, kv_heads)
    splits = {
        fold: mix_heads(covariance, metric=metric, num_slots=len(goal.slot_frequencies), fold=fold)
        for fold in goal.folds
    }
    fold = min(
        splits,
        key=lambda fold: rotation_error(
            splits[fold],
            covariance,
            query_moment,
            distances=moments.distances,
            pair_frequencies=goal.pair_frequencies,
            slot_frequencies=goal.slot_frequencies,
        ).item(),
    )
    slots = as_real(splits[fold].down.flatten(1))
    rest = torch.eye(slots.shape[1]).to(slots) - as_real(splits[fold].up.flatten(0, 1)) @ slots
    # Without its slot a pair still turns by ρ on average; the queries take that with them.
    rotation = expected_rotation(moments.distances, goal.pair_frequencies)
    rested = interleave(rotation.unsqueeze(-1) * query)
    key_metric = rested @ moments.uniform @ rested.mT * (moments.spread / weights.key.shape[1])[:, None, None]
    value_metric = weights.output_gram * moments.mass[:, None, None]
    root = torch.block_diag(*sqrt_psd(per_group(key_metric, kv_heads)), *sqrt_psd(per_group(value_metric, kv_heads)))
    joint = torch.block_diag(rest, torch.eye(slots.shape[1]).to(slots))
    moment = weights.joint @ moments.attended @ weights.joint.T
    # A latent as large as all keys and values holds them all; an engine that wants more of it gets zeros.
    rank = min(goal.kv_lora_rank, len(joint))
    latent = low_rank(joint, moment=moment, metric_root=root, rank=rank).down
    return torch.cat([pad(slots, 1, joint.shape[1]), latent]), fold
