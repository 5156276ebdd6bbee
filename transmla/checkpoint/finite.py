"""Weights that are numbers: a NaN or an infinity spoils every result computed from it."""

from __future__ import annotations

import torch
from torch import Tensor

from transmla.errors import CheckpointError


def check_finite(name: str, tensor: Tensor) -> None:
    """Refuse a tensor with a NaN or an infinity.

    The extremes tell: ``aminmax`` carries a NaN through, in one pass without a temporary as large as the tensor.

    Raises:
        CheckpointError: some value is not finite.
    """
    if not tensor.is_floating_point() or tensor.numel() == 0:
        return
    low, high = torch.aminmax(tensor if tensor.dtype.itemsize > 1 else tensor.float())
    if not (low.isfinite() and high.isfinite()):
        raise CheckpointError(f"Tensor {name} holds values that are NaN or infinite; finite weights are needed.")
