"""Rotary pairs as complex numbers.

The rotate-half layout pairs dimension l with l + head_dim/2; read as one complex number, RoPE at frequency θ is a
multiplication by exp(iθ·position), and a logit is ``Re Σ q·conj(k)·exp(iθΔ)`` with Δ the distance of query and key.
"""

import math

import torch
from jaxtyping import Complex, Float
from torch import Tensor


def to_pairs(x: Float[Tensor, "*batch head_dim hidden"]) -> Complex[Tensor, "*batch pair hidden"]:
    """Read rotate-half rows as complex pairs: row l is the real part, row l + head_dim/2 the imaginary part."""
    return torch.complex(*x.chunk(2, dim=-2))


def from_pairs(z: Complex[Tensor, "*batch pair hidden"]) -> Float[Tensor, "*batch head_dim hidden"]:
    """Write complex pairs as rotate-half rows; the inverse of :func:`to_pairs`."""
    return torch.cat([z.real, z.imag], dim=-2)


def interleave(z: Complex[Tensor, "*batch slot hidden"]) -> Float[Tensor, "*batch rope hidden"]:
    """Write complex slots as DeepSeek's interleaved rows: real, imaginary, real, imaginary, …"""
    return torch.stack([z.real, z.imag], dim=-2).flatten(-3, -2)


def as_real(matrix: Complex[Tensor, "*batch out in"]) -> Float[Tensor, "*batch out2 in2"]:
    """Write a complex matrix as the real one that acts on interleaved pairs: a + ib becomes [[a, −b], [b, a]]."""
    return torch.stack([interleave(matrix), interleave(1j * matrix)], dim=-1).flatten(-2)


def long_tail(
    distances: Float[Tensor, "heads distance"], *, context: int, share: float, points: int = 96
) -> tuple[Float[Tensor, "heads longer"], Float[Tensor, " longer"]]:
    """Add distances that calibration windows are too short to show, uniform in their logarithm up to ``context``.

    A map that is fitted without them is free to do anything there. Returns the probabilities, and the distances.
    """
    window = distances.shape[-1]
    near = torch.arange(window).to(distances)
    if context <= window:
        return distances, near
    far = torch.logspace(math.log10(window), math.log10(context), points).to(distances)
    tail = distances.new_full((len(distances), points), share / points)
    return torch.cat([(1 - share) * distances, tail], dim=-1), torch.cat([near, far])


def expected_rotation(
    distances: Float[Tensor, "heads distance"], frequency: Float[Tensor, "*shape"]
) -> Complex[Tensor, "heads *shape"]:
    """Average a rotation over the distances at which a head attends, ρ_h(ω) = E_Δ[exp(iωΔ)].

    A pair that turns at θ, carried by a slot that turns at φ, is best multiplied by ρ(θ − φ); a share 1 − |ρ|² of its
    energy is lost. φ = 0 is the part without rotation.

    Args:
        distances: distribution of the distance, one row a head, each summing to 1.
        frequency: angular frequencies ω in radians per token.
    """
    delta = torch.arange(distances.shape[-1], dtype=distances.dtype, device=distances.device)
    angle = frequency.reshape(-1, 1).to(delta) * delta
    turns = torch.polar(torch.ones_like(angle), angle)
    return (distances.to(turns.dtype) @ turns.T).reshape(-1, *frequency.shape)


def rope_frequencies(theta: float, dim: int) -> Float[Tensor, " slot"]:
    """Return the plain RoPE grid ``theta^(−2s/dim)``, in radians per token."""
    return theta ** (-torch.arange(0, dim, 2, dtype=torch.float64) / dim)


def rotate(
    x: Float[Tensor, "*batch tokens head_dim"], frequencies: Float[Tensor, " pair"]
) -> Float[Tensor, "*batch tokens head_dim"]:
    """Apply RoPE in the rotate-half layout to tokens at positions 0, 1, 2, …"""
    positions = torch.arange(x.shape[-2], dtype=torch.float32, device=x.device)
    angle = positions.unsqueeze(-1) * frequencies.to(positions)
    cos, sin = angle.cos(), angle.sin()
    real, imaginary = x.chunk(2, dim=-1)
    return torch.cat([real * cos - imaginary * sin, imaginary * cos + real * sin], dim=-1)


def rotate_interleaved(
    x: Float[Tensor, "*batch tokens rope"], frequencies: Float[Tensor, " slot"]
) -> Float[Tensor, "*batch tokens rope"]:
    """Apply RoPE in DeepSeek's interleaved layout to tokens at positions 0, 1, 2, …"""
    pairs = x.unflatten(-1, (-1, 2))
    rotated = rotate(torch.cat([pairs[..., 0], pairs[..., 1]], dim=-1), frequencies)
    return torch.stack(rotated.chunk(2, dim=-1), dim=-1).flatten(-2)
