"""The last closed form: W_O by least squares on what the converted heads really put out.

Heads err together, and one head can make up for another (docs/concepts/algorithm.md, "Error feedback"). With z the
outputs of all heads side by side,

    minimise  Σ_tokens w ‖o − W z‖² + tr((W − W_O) Λ (W − W_O)ᵀ),        Λ = ridge · diag(Σ w z zᵀ)

pulls towards the source's W_O as hard as ``ridge`` says, whatever the size of a head's outputs.
"""

from dataclasses import replace

import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor

from transmla.convert.fit.targets import LayerTargets
from transmla.convert.latent_attention import LatentAttention

_RIDGE = 1e-2


@torch.no_grad()
def refit_output(
    layer: LatentAttention, targets: LayerTargets, frequencies: Float[Tensor, " slot"], *, batch_size: int
) -> LatentAttention:
    """Return the layer with its output projection refitted to the targets; products in float32, sums in float64."""
    heads, hidden, value = layer.output.shape
    gram = torch.zeros(heads * value, heads * value, dtype=torch.float64, device=layer.output.device)
    cross = torch.zeros(heads * value, hidden, dtype=torch.float64, device=layer.output.device)
    for batch in targets.batches(batch_size):
        heads_output = rearrange(layer.heads_output(batch.inputs, frequencies), "b h t d -> (b t) (h d)")
        weighted = heads_output * batch.weights.flatten().unsqueeze(-1)
        gram += weighted.mT @ heads_output
        wanted = batch.outputs if layer.output_bias is None else batch.outputs - layer.output_bias
        cross += weighted.mT @ wanted.flatten(0, 1)
    before = rearrange(layer.output.double(), "h x d -> (h d) x")
    energy = gram.diagonal()
    pull = _RIDGE * energy + 1e-9 * energy.mean() + torch.finfo(torch.float64).tiny
    gram.diagonal().add_(pull)
    after = torch.linalg.solve(gram, cross + pull.unsqueeze(-1) * before)
    return replace(layer, output=rearrange(after.to(layer.output.dtype), "(h d) x -> h x d", h=heads))
