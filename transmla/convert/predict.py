"""Automatic sizes: what each way to split the cache between rotary slots and latent is predicted to cost.

The source runs once over a few windows. For each layer the cost of the best cache of each size follows from the moments
alone (:class:`~transmla.linalg.variable_projection.CacheProblem`), so a candidate costs a search, not a conversion.
"""

import math
from collections.abc import Sequence

from jaxtyping import Int
from torch import Tensor

from transmla.calibration.moments import MomentSums
from transmla.calibration.stream import add_experts
from transmla.convert.plan import ConversionPlan
from transmla.convert.sizes import PREDICTION_WINDOWS, freq_folds
from transmla.convert.source_layers import attention_weights, read_experts, read_layer, source_stream
from transmla.convert.summary import Prediction
from transmla.deepseek.sizes import MLASizes
from transmla.device import trim_memory
from transmla.progress import Progress, Silent


def predict_splits(
    plan: ConversionPlan,
    windows: Int[Tensor, "windows tokens"],
    splits: Sequence[MLASizes],
    *,
    progress: Progress | None = None,
) -> tuple[Prediction, ...]:
    """Predict the error of each split, all of them on the first windows; the least first."""
    windows = windows[:PREDICTION_WINDOWS]
    stream = source_stream(plan, windows)
    totals = dict.fromkeys(splits, 0.0)
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
                # Rounding may take the cost of a cache that loses nothing below zero.
                cost = max(0.0, plan.method.predict(weights, moments, goal))
                totals[split] += cost / residual / plan.spec.num_hidden_layers if residual else 0.0
            advance(1)
    predictions = (
        Prediction(
            kv_lora_rank=split.kv_lora_rank, qk_rope_head_dim=split.qk_rope_head_dim, error=math.sqrt(totals[split])
        )
        for split in splits
    )
    return tuple(sorted(predictions, key=lambda prediction: prediction.error))


def _folds(plan: ConversionPlan, split: MLASizes) -> tuple[int, ...]:
    folds = freq_folds(plan.spec, split.qk_rope_head_dim)
    return tuple(folds) if plan.request.freq_fold is None else (plan.request.freq_fold,)
