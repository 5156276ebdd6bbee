"""The latent norm that DeepSeek-V3 has and grouped-query attention has not, written so that it does nothing.

Every engine normalizes the latent: ``kv_a_layernorm(c) = w · c / sqrt(mean(c²) + eps)``. Written so small that
mean(c²) ≪ eps, the latent passes that norm multiplied by the constant ``w / sqrt(eps)``, which is chosen to restore
its size; the relative error is mean(c²)/(2·eps). The weight w is a power of two, exact in every storage type, and the
rest of the constant goes into the rows of ``kv_a_proj_with_mqa`` before their one cast
(docs/concepts/checkpoint-format.md, "The neutral latent norm"; the eps is a matter of
docs/concepts/checkpoint-format.md, "The eps and the residual stream").
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

import torch
from jaxtyping import Float
from torch import Tensor

from transmla.config import Profile
from transmla.linalg.latent_norm import LATENT_EPS


@dataclass(frozen=True)
class NeutralNorm:
    """How small the latent is written.

    Attributes:
        eps: eps of the latent norm, and of every other norm of the target.
        error: relative error mean(c²)/(2·eps) aimed at.
        bounded: aim at it for every possible token, not for the average one. 8-bit blocks cannot hold rows as small as
            that asks for.
    """

    eps: float
    error: float
    bounded: bool


NORMS: Mapping[Profile, NeutralNorm] = MappingProxyType(
    {
        "portable": NeutralNorm(eps=LATENT_EPS, error=1e-6, bounded=True),
        "quantizable": NeutralNorm(eps=1.0, error=1e-4, bounded=False),
    }
)


def residual_scale(eps: float, norm: NeutralNorm) -> float:
    """Return s such that a residual stream s times as large gives the same RMSNorm at the target's eps.

    RMSNorm with eps' = s²·eps of s·x equals RMSNorm with eps of x, exactly.
    """
    return math.sqrt(norm.eps / eps)


def neutralize(
    down: Float[Tensor, "rank hidden"], norm: NeutralNorm, moment: Float[Tensor, "hidden hidden"] | None, bound: float
) -> tuple[Float[Tensor, "rank hidden"], Float[Tensor, " rank"]]:
    """Return the shrunken projection and the norm weight that undoes it."""
    if norm.bounded or moment is None:
        mean_square = torch.linalg.eigvalsh(down @ down.mT)[-1].item() * bound**2 / len(down)
    else:
        mean_square = ((down @ moment.to(down)) * down).sum().item() / len(down)
    shrink = math.sqrt(2 * norm.eps * norm.error / mean_square) if mean_square > 0 else 1.0
    weight = 2.0 ** math.ceil(math.log2(math.sqrt(norm.eps) / shrink))
    return down * (math.sqrt(norm.eps) / weight), down.new_full((len(down),), weight)
