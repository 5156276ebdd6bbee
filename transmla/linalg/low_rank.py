"""The one approximation that everything else is made of: low rank in a metric.

A linear map ``y = W x`` is to pass through ``rank`` numbers, ``y ≈ up @ (down @ x)``. What an error in ``y``
costs is given by a metric, how ``x`` is distributed by its second moment:

    minimise  tr( metric · (W − up·down) · moment · (W − up·down)ᴴ )

With E the leading eigenvectors of ``metric^½ W moment Wᴴ metric^½`` the minimum is reached by
``down = Eᴴ metric^½ W`` and ``up`` the regression of ``y`` on ``down @ x``; it equals the sum of the eigenvalues
left out (Eckart-Young in the weighted norm). Written with the regression, ``up`` needs no inverse of the metric:
directions that cost nothing are still predicted as well as they can be.

Which complex combinations of the heads' keys share a rotary slot, the joint latent of keys and values, and the optional
low-rank queries are this function with three different metrics (docs/concepts/algorithm.md, "Low rank in a metric").
"""

from typing import NamedTuple

import torch
from jaxtyping import Inexact
from torch import Tensor

from transmla.linalg.hermitian import leading_eigenvectors


class LowRank(NamedTuple):
    """``weight ≈ up @ down`` with what was lost.

    Attributes:
        up: the regression of the output on the ``rank`` numbers.
        down: the ``rank`` functionals, uncorrelated under the moment.
        dropped: the cost that remains, in units of metric × moment.
    """

    up: Inexact[Tensor, "out rank"]
    down: Inexact[Tensor, "rank in"]
    dropped: Inexact[Tensor, ""]


def low_rank(
    weight: Inexact[Tensor, "out in"],
    *,
    moment: Inexact[Tensor, "in in"],
    metric_root: Inexact[Tensor, "out out"],
    rank: int,
) -> LowRank:
    """Factorise ``weight`` through ``rank`` numbers at the least cost in the metric.

    Args:
        weight: real or complex map.
        moment: second moment E[x xᴴ] of its input.
        metric_root: Hermitian square root of the metric on its output.
        rank: numbers to keep; beyond the rank of the problem the factors are padded with zeros.
    """
    output_moment = weight @ moment @ weight.mH
    weighted = metric_root @ output_moment @ metric_root
    values, vectors = leading_eigenvectors((weighted + weighted.mH) / 2, rank)
    # Directions at rounding level carry nothing; dividing by them would blow noise up to signal.
    tiny = values.new_tensor(torch.finfo(values.dtype).eps) * len(weighted) * values.max()
    kept = values > tiny
    inverse = torch.where(kept, 1 / torch.where(kept, values, 1), 0)
    down = (vectors * kept).mH @ metric_root @ weight
    up = output_moment @ metric_root @ (vectors * inverse)
    dropped = torch.linalg.diagonal(weighted).real.sum() - values.sum()
    return LowRank(pad(up, 1, rank), pad(down, 0, rank), dropped.clamp_min(0))


def pad(matrix: Inexact[Tensor, "..."], dim: int, size: int) -> Inexact[Tensor, "..."]:
    """Append zeros along ``dim`` up to ``size``."""
    missing = size - matrix.shape[dim]
    if missing <= 0:
        return matrix
    shape = list(matrix.shape)
    shape[dim] = missing
    return torch.cat([matrix, matrix.new_zeros(shape)], dim=dim)
