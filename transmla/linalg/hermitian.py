"""Hermitian matrices: square roots and leading eigenvectors, reproducible from run to run."""

import torch
from jaxtyping import Inexact
from torch import Tensor


def sqrt_psd(matrix: Inexact[Tensor, "*batch n n"]) -> Inexact[Tensor, "*batch n n"]:
    """Return the positive semi-definite square root, ``root @ root = matrix``.

    Eigenvalues below zero are rounding and count as zero.
    """
    values, vectors = torch.linalg.eigh(matrix)
    return (vectors * values.clamp_min(0).sqrt().unsqueeze(-2)) @ vectors.mH


def sqrt_and_inverse(
    matrix: Inexact[Tensor, "n n"], *, share: float
) -> tuple[Inexact[Tensor, "n n"], Inexact[Tensor, "n n"]]:
    """Return the square root and its inverse, with every eigenvalue raised by ``share`` of the mean one."""
    values, vectors = torch.linalg.eigh(matrix)
    values = (values + share * values.mean()).clamp_min(torch.finfo(values.dtype).tiny).sqrt()
    return (vectors * values) @ vectors.mH, (vectors / values) @ vectors.mH


def clamp_psd(matrix: Inexact[Tensor, "*batch n n"]) -> Inexact[Tensor, "*batch n n"]:
    """Return the nearest positive semi-definite matrix: a moment summed in float32 may miss that by rounding."""
    # Far cheaper than eigenvectors, and a matrix that has a Cholesky factor has nothing to clamp.
    if not torch.linalg.cholesky_ex(matrix).info.any():
        return matrix
    values, vectors = torch.linalg.eigh(matrix)
    return (vectors * values.clamp_min(0).unsqueeze(-2)) @ vectors.mH


def leading_eigenvectors(
    matrix: Inexact[Tensor, "n n"], rank: int
) -> tuple[Inexact[Tensor, " rank"], Inexact[Tensor, "n rank"]]:
    """Return the ``rank`` largest eigenvalues, largest first, and their unit eigenvectors as columns.

    An eigenvector is defined up to a phase, which libraries choose freely; here its largest entry is made real
    and positive, so that the same input gives the same bytes.
    """
    values, vectors = torch.linalg.eigh(matrix)
    values, vectors = values.flip(-1)[:rank].clamp_min(0), vectors.flip(-1)[:, :rank]
    peak = vectors.gather(0, vectors.abs().argmax(dim=0, keepdim=True))
    return values, vectors * (peak.abs() / peak)
