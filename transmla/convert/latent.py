"""A latent attention layer in plain factors: what the mathematics produces, before any engine's format.

    c = latent x        κ = key_rope x        q_h = query_h x
    logit_h = softmax_scale · ( q_h[:nope] · (key_up_h c)  +  q_h[nope:] rotated · κ rotated )
    output  = Σ_h output_h (value_up_h c)

Rotary rows are interleaved pairs, as in DeepSeek's code, and the softmax scale is still the source's.
"""

from dataclasses import dataclass, replace

import torch
from jaxtyping import Float
from torch import Tensor

from transmla.convert.sizes import MLASizes
from transmla.linalg.low_rank import pad


@dataclass(frozen=True, eq=False)
class LatentAttention:
    """The factors of one layer.

    Attributes:
        query_nope, query_rope: per head, from the layer input, or from ``query_down`` where there is one.
        query_down: optional low-rank query projection.
        latent: down projection to the cached latent.
        key_rope: projection to the cached rotary key, shared by all heads.
        key_up, value_up: per head, from the latent.
        output: per head, to the residual stream.
        softmax_scale: factor on the logits.
    """

    query_nope: Float[Tensor, "heads nope query_in"]
    query_rope: Float[Tensor, "heads rope query_in"]
    latent: Float[Tensor, "rank hidden"]
    key_rope: Float[Tensor, "rope hidden"]
    key_up: Float[Tensor, "heads nope rank"]
    value_up: Float[Tensor, "heads value rank"]
    output: Float[Tensor, "heads hidden value"]
    softmax_scale: float
    query_down: Float[Tensor, "query_rank hidden"] | None = None

    @property
    def query(self) -> Float[Tensor, "heads query_dim query_in"]:
        """Non-rotary then rotary rows of each head, DeepSeek's order."""
        return torch.cat([self.query_nope, self.query_rope], dim=1)

    def padded(self, sizes: MLASizes) -> "LatentAttention":
        """Pad with zeros up to ``sizes``; the function computed stays the same."""
        return replace(
            self,
            query_nope=pad(self.query_nope, 1, sizes.qk_nope_head_dim),
            latent=pad(self.latent, 0, sizes.kv_lora_rank),
            key_up=pad(pad(self.key_up, 1, sizes.qk_nope_head_dim), 2, sizes.kv_lora_rank),
            value_up=pad(pad(self.value_up, 1, sizes.v_head_dim), 2, sizes.kv_lora_rank),
            output=pad(self.output, 2, sizes.v_head_dim),
        )
