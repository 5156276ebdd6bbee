"""What a converted layer should do: bring the residual stream back to the source's, on inputs it will really have.

The layers below are converted already, so a layer is fitted on *their* outputs. What it should add to them is what is
missing to the source's residual stream after its attention: the source's attention output for the same token, and what
the layers below still owe (docs/concepts/algorithm.md, "Error feedback").
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from transmla.convert.latent_attention import LatentAttention

# Mean square of an output that is none, as a share of that of the residual stream.
_NOTHING = 1e-9


@dataclass(frozen=True, eq=False)
class LayerTargets:
    """Windows to learn from, or to be judged on.

    Attributes:
        inputs: of the converted attention, after its input norm.
        outputs: what the attention should put out.
        weights: what a squared error counts at each token: one over the mean square of the residual stream that
            attention adds to, for that is what the next norm divides by.
    """

    inputs: Float[Tensor, "windows tokens hidden"]
    outputs: Float[Tensor, "windows tokens hidden0"]
    weights: Float[Tensor, "windows tokens"]

    def batches(self, size: int) -> Iterator["LayerTargets"]:
        """Cut into batches of windows."""
        parts = zip(self.inputs.split(size), self.outputs.split(size), self.weights.split(size), strict=True)
        return (LayerTargets(*part) for part in parts)

    def loss(self, layer: LatentAttention, frequencies: Float[Tensor, " slot"]) -> Float[Tensor, ""]:
        """Return the weighted squared error of ``layer``, as a share of the weighted square of the outputs."""
        wrong = (layer.attend(self.inputs, frequencies) - self.outputs).square().sum(-1)
        wanted = (self.outputs.square().sum(-1) * self.weights).sum()
        # A layer may have nothing to say.
        return (wrong * self.weights).sum() / wanted.clamp_min(_NOTHING * self.outputs.numel())


@torch.no_grad()
def relative_error(
    layer: LatentAttention, targets: LayerTargets, frequencies: Float[Tensor, " slot"], *, batch_size: int
) -> float:
    """Return ‖found − wanted‖ as a share of the residual stream's length, root mean square over tokens.

    Not as a share of ‖wanted‖: a few tokens have a residual stream a hundred times as long, and only they would count.
    """
    wrong = 0.0
    for batch in targets.batches(batch_size):
        error = (layer.attend(batch.inputs, frequencies) - batch.outputs).square().mean(-1)
        wrong += (error * batch.weights).sum().item()
    return (wrong / targets.weights.numel()) ** 0.5
