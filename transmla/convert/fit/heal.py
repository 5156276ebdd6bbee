"""A few hundred steps of Adam on all factors of one layer, with nothing but that layer in memory.

See docs/concepts/algorithm.md, "Healing".

The factors are trained in their plain scale; the tiny rows that neutralise the latent norm are written afterwards.
Each factor's steps are in proportion to its own size, so that one learning rate suits all of them, and all layers.
The layer that came in is a closed form, the optimum on the moments of all windows, and training sees few windows at a
time: it first leads away from there. So up to a tenth of the windows is held back to judge by, some points on the way
are judged, and some between the start and the best of them; the best of all is kept, be it the layer that came in. More
steps than the text is good for do no harm.
"""

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from transmla.convert.fit.targets import LayerTargets
from transmla.convert.latent_attention import LatentAttention

LEARNING_RATE = 2e-2
_WARMUP = 10
_FLOOR = 0.03
# Windows that say whether training has helped: a yes or a no needs no more, and the others need all they can get.
_JUDGES = 16
# Points on the way that are judged, and places between the start (0) and the best of them (1).
_POINTS = 8
_BETWEEN = (0.25, 0.5, 0.75)


class Judged(NamedTuple):
    """A layer, and its loss on the windows that judge."""

    loss: float
    layer: LatentAttention


class HealedLayer(NamedTuple):
    """What healing made of a layer.

    Attributes:
        attention: the best factors; the very layer that came in where none were better.
        gain: how much less their loss is on the windows that judge, as a share of it: 0 where nothing was better.
    """

    attention: LatentAttention
    gain: float


def heal_layer(
    layer: LatentAttention,
    targets: LayerTargets,
    frequencies: Float[Tensor, " slot"],
    *,
    steps: int,
    batch_size: int,
    seed: int,
    dtype: torch.dtype = torch.float32,
) -> HealedLayer:
    """Train all factors towards the targets; the same seed gives the same factors.

    Args:
        layer: plain factors; not changed.
        targets: windows to train on; up to a tenth of them decides whether training has helped.
        frequencies: of the rotary slots.
        steps: updates, each on ``batch_size`` windows.
        batch_size: windows per update.
        seed: of the order of the windows.
        dtype: of the matrix products; float16 is trained in bfloat16, whose range needs no scaling of the loss.
    """
    held_back = min(max(1, len(targets.inputs) // 10), _JUDGES)
    judge, targets = _rows(targets, slice(0, held_back)), _rows(targets, slice(held_back, None))
    if steps == 0 or len(targets.inputs) == 0:
        return HealedLayer(layer, 0.0)

    def judged(candidate: LatentAttention) -> Judged:
        return Judged(_loss(candidate, judge, frequencies, batch_size), candidate)

    start = judged(layer)
    best = min(
        map(judged, _points(layer, targets, frequencies, steps, batch_size, seed, dtype)), key=lambda at: at.loss
    )
    between = (judged(_between(layer, best.layer, share)) for share in _BETWEEN)
    best = min(start, best, *between, key=lambda at: at.loss)
    return HealedLayer(best.layer, 1 - best.loss / start.loss if best.layer is not layer else 0.0)


def _points(
    layer: LatentAttention,
    targets: LayerTargets,
    frequencies: Float[Tensor, " slot"],
    steps: int,
    batch_size: int,
    seed: int,
    dtype: torch.dtype,
) -> Iterator[LatentAttention]:
    """Train, and yield the factors at some points, the last one among them."""
    healed = layer.map(lambda factor: factor.detach().clone().requires_grad_())
    groups = [
        {"params": [factor], "lr": LEARNING_RATE * factor.detach().square().mean().sqrt().item()}
        for factor in healed.factors
    ]
    optimizer = torch.optim.Adam(groups, betas=(0.9, 0.95), eps=1e-12)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: _schedule(step, steps))
    order = _Shuffled(len(targets.inputs), seed)
    every = math.ceil(steps / _POINTS)
    for step in range(1, steps + 1):
        batch = _rows(targets, order.take(batch_size))
        optimizer.zero_grad()
        # Never half precision unasked: processors without units for it take a hundred times as long.
        with (
            torch.enable_grad(),
            torch.autocast(targets.inputs.device.type, torch.bfloat16, enabled=dtype != torch.float32),
        ):
            loss = batch.loss(healed, frequencies)
        loss.backward()
        optimizer.step()
        schedule.step()
        if step % every == 0 or step == steps:
            yield healed.map(lambda factor: factor.detach().clone())


def _between(start: LatentAttention, end: LatentAttention, share: float) -> LatentAttention:
    """Return the factors at a share of the way."""
    ends = iter(end.factors)
    return start.map(lambda factor: factor.lerp(next(ends), share))


def _schedule(step: int, steps: int) -> float:
    """Warm up, then follow half a cosine down to a small floor."""
    return min(1, (step + 1) / _WARMUP) * (_FLOOR + (1 - _FLOOR) * (1 + math.cos(math.pi * step / steps)) / 2)


@torch.no_grad()
def _loss(layer: LatentAttention, judge: LayerTargets, frequencies: Tensor, batch_size: int) -> float:
    losses = [batch.loss(layer, frequencies).item() * len(batch.inputs) for batch in judge.batches(batch_size)]
    loss = sum(losses)
    return loss if math.isfinite(loss) else math.inf


def _rows(targets: LayerTargets, rows: slice | Tensor) -> LayerTargets:
    return LayerTargets(targets.inputs[rows], targets.outputs[rows], targets.weights[rows])


class _Shuffled:
    """Windows in an order that is drawn anew for each pass."""

    def __init__(self, count: int, seed: int) -> None:
        self._count, self._generator = count, torch.Generator().manual_seed(seed)
        self._order = torch.empty(0, dtype=torch.int64)

    def take(self, size: int) -> Tensor:
        """Return the next ``size`` window numbers, or all there are."""
        size = min(size, self._count)
        if len(self._order) < size:
            self._order = torch.randperm(self._count, generator=self._generator)
        rows, self._order = self._order[:size], self._order[size:]
        return rows
