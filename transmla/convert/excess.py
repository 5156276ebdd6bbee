"""From the predicted error of a size to the loss that it will add: excess ≈ c · error².

The loss of the source is nearly at its least as a function of what its layers output, so that a small error adds loss
with its square. How much is measured, here, on models that have been converted and evaluated; a further model is a line
of ``MEASURED``. See docs/concepts/algorithm.md, "Keys and values in a prediction".
"""

import math
from collections.abc import Sequence

from transmla.convert.predict import KEY_WEIGHT
from transmla.records import Record


class MeasuredSize(Record):
    """A conversion whose error was predicted, and whose loss was measured.

    Attributes:
        text: what was fitted and evaluated, always on other documents.
        key_error, value_error: as predicted, see :class:`~transmla.convert.summary.Prediction`.
        excess: of the closed form, without healing: log perplexity minus the source's, in nats per token.
    """

    model: str
    text: str
    kv_lora_rank: int
    qk_rope_head_dim: int
    key_error: float
    value_error: float
    excess: float

    @property
    def squared_error(self) -> float:
        """The square of the predicted error, as sizes are compared by it."""
        return KEY_WEIGHT * self.key_error**2 + self.value_error**2


_MODEL = "SmolLM2-135M-Instruct"
_TRIAL, _RESULTS = "Wikipedia, 96 windows", "Wikipedia, 128 windows"
MEASURED = tuple(
    MeasuredSize(
        model=_MODEL,
        text=text,
        kv_lora_rank=latent,
        qk_rope_head_dim=rotary,
        key_error=keys,
        value_error=values,
        excess=excess,
    )
    for text, latent, rotary, keys, values, excess in (
        (_TRIAL, 96, 32, 0.0316, 0.0190, 0.212),
        (_TRIAL, 64, 64, 0.0188, 0.0275, 0.277),
        (_RESULTS, 160, 32, 0.0306, 0.0073, 0.112),
        (_RESULTS, 128, 64, 0.0172, 0.0120, 0.088),
    )
)


def excess_factor(measured: Sequence[MeasuredSize] = MEASURED) -> float:
    """Return c, nats per token for a squared error of one: the geometric mean of what was measured."""
    logs = [math.log(size.excess / size.squared_error) for size in measured]
    return math.exp(sum(logs) / len(logs))


def predicted_excess(error: float) -> float:
    """Predict the loss that a conversion adds, in nats per token, from its predicted error."""
    return excess_factor() * error**2


def miss(size: MeasuredSize, measured: Sequence[MeasuredSize] = MEASURED) -> float:
    """Return how far the others' factor predicts a size off: 0.1 is a tenth too much."""
    others = [other for other in measured if other != size]
    return excess_factor(others) * size.squared_error / size.excess - 1


def how_far_off(measured: Sequence[MeasuredSize] = MEASURED) -> str:
    """Return the sentence that every prediction of an excess comes with."""
    misses = [miss(size, measured) for size in measured]
    excesses = [size.excess for size in measured]
    models = ", ".join(dict.fromkeys(size.model for size in measured))
    return (
        f"Where excess was measured, without healing ({models}, {len(measured)} sizes, {min(excesses):.2g} to "
        f"{max(excesses):.2g} nats), predictions were off by {min(misses):+.0%} to {max(misses):+.0%}, each size "
        "predicted from the others; for other models and texts trust only the order and the rough factor."
    )
