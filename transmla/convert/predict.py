"""Automatic sizes: what each way to split the cache between rotary slots and latent is predicted to cost.

The source runs once over a few windows. For each layer the cost of the best cache of each size follows from the moments
alone (:class:`~transmla.linalg.variable_projection.CacheProblem`), so a candidate costs a search, not a conversion.
Errors in keys and in values are predicted apart, and weighed against each other at the end.
"""

import math
from collections.abc import Sequence

from jaxtyping import Int
from torch import Tensor

from transmla.calibration.moments import MomentSums
from transmla.calibration.stream import add_experts
from transmla.convert.methods.base import PredictedCost
from transmla.convert.plan import ConversionPlan
from transmla.convert.sizes import PREDICTION_WINDOWS, freq_folds
from transmla.convert.source_layers import attention_weights, read_experts, read_layer, source_stream
from transmla.convert.summary import Prediction
from transmla.deepseek.sizes import MLASizes
from transmla.device import trim_memory
from transmla.progress import Progress, Silent

#: What a squared error of the output counts where it comes from the keys, compared with one from the values. Measured:
#: docs/concepts/algorithm.md, "Keys and values in a prediction". The search for the cache itself takes both at par.
KEY_WEIGHT = 1 / 3.5


def predict_splits(
    plan: ConversionPlan,
    windows: Int[Tensor, "windows tokens"],
    splits: Sequence[MLASizes],
    *,
    progress: Progress | None = None,
) -> tuple[Prediction, ...]:
    """Predict the error of each split, all of them in one pass over the same windows; the least first."""
    windows = prediction_windows(plan, windows)
    stream = source_stream(plan, windows)
    totals = dict.fromkeys(splits, PredictedCost(0.0, 0.0))
    goals = {split: plan.layer_goal(split, _folds(plan, split)) for split in splits}
    with (progress or Silent()).task("Comparing sizes", plan.spec.num_hidden_layers) as advance:
        for index in range(plan.spec.num_hidden_layers):
            trim_memory()
            tensors = read_layer(plan, index)
            residual = 0.0
            with stream.layer(index, tensors) as layer:
                weights = attention_weights(plan, tensors, layer, source=stream)
                sums = MomentSums(weights, plan.spec, tokens=windows.shape[1])
                for attended in stream.advance(layer, slice(None)):
                    sums.add(attended)
                    residual += attended.residual.float().square().sum().item() / windows.numel()
            add_experts([stream], read_experts(plan, index))
            moments = sums.finish()
            for split, goal in goals.items():
                if residual:
                    totals[split] = _added(totals[split], plan.method.predict(weights, moments, goal), residual)
            advance(1)
    predictions = (_prediction(split, total, plan.spec.num_hidden_layers) for split, total in totals.items())
    return tuple(sorted(predictions, key=lambda prediction: prediction.error))


def prediction_windows(plan: ConversionPlan, windows: Int[Tensor, "windows tokens"]) -> Int[Tensor, "compared tokens"]:
    """Return the windows that sizes are compared on: the first of those to fit on, none that is held out.

    What these windows ask for decides the split: where copying is to count, they must hold something to copy.
    """
    return windows[: min(PREDICTION_WINDOWS, plan.counts.num_fit)]


def _added(total: PredictedCost, cost: PredictedCost, residual: float) -> PredictedCost:
    """Add a layer's costs as shares of its residual stream; rounding may take those of a whole cache below zero."""
    return PredictedCost(*(before + max(0.0, now) / residual for before, now in zip(total, cost, strict=True)))


def _prediction(split: MLASizes, total: PredictedCost, num_layers: int) -> Prediction:
    keys, values = (cost / num_layers for cost in total)
    return Prediction(
        kv_lora_rank=split.kv_lora_rank,
        qk_rope_head_dim=split.qk_rope_head_dim,
        key_error=math.sqrt(keys),
        value_error=math.sqrt(values),
        error=math.sqrt(KEY_WEIGHT * keys + values),
    )


def _folds(plan: ConversionPlan, split: MLASizes) -> tuple[int, ...]:
    folds = freq_folds(plan.spec, split.qk_rope_head_dim)
    return tuple(folds) if plan.request.freq_fold is None else (plan.request.freq_fold,)
