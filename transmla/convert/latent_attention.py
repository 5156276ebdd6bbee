"""A latent attention layer in plain factors: what the mathematics produces, before any engine's format.

    c = latent x        κ = key_rope x        q_h = query_h x
    logit_h = softmax_scale · ( q_h[:nope] · (key_up_h c)  +  q_h[nope:] rotated · κ rotated )
    output  = Σ_h output_h (value_up_h c)

With ``output_bias``, that is added. With ``latent_norm``, c is what RMSNorm with that weight makes of it, as in
DeepSeek's code; without it, c is as it is. Rotary rows are interleaved pairs, as in DeepSeek's code, and the softmax
scale is still the source's. Where the source has biases, x ends in a one, and the last columns of the projections from
x are their biases.
"""

from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from transmla.deepseek.sizes import MLASizes
from transmla.linalg.latent_norm import unit_size
from transmla.linalg.low_rank import pad
from transmla.linalg.rotary import rotate_interleaved


@dataclass(frozen=True, eq=False)
class LatentAttention:
    """The factors of one layer.

    Attributes:
        query_nope, query_rope: per head, from the layer input, or from ``query_down`` where there is one.
        query_down: optional low-rank query projection.
        output_bias: optional, what is put out whatever the input.
        latent_norm: optional weight of an RMSNorm on the latent.
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
    output: Float[Tensor, "heads hidden0 value"]
    softmax_scale: float
    query_down: Float[Tensor, "query_rank hidden"] | None = None
    latent_norm: Float[Tensor, " rank"] | None = None
    output_bias: Float[Tensor, " hidden0"] | None = None

    @property
    def query(self) -> Float[Tensor, "heads query_dim query_in"]:
        """Non-rotary then rotary rows of each head, DeepSeek's order."""
        return torch.cat([self.query_nope, self.query_rope], dim=1)

    def map(self, change: Callable[[Tensor], Tensor]) -> "LatentAttention":
        """Return the layer with every factor changed."""
        changed: dict[str, Any] = {
            field.name: change(factor)
            for field in fields(self)
            if isinstance(factor := getattr(self, field.name), Tensor)
        }
        return replace(self, **changed)

    @property
    def factors(self) -> list[Tensor]:
        """All tensors of the layer."""
        return [factor for field in fields(self) if isinstance(factor := getattr(self, field.name), Tensor)]

    def latents(self, inputs: Float[Tensor, "*batch hidden"]) -> Float[Tensor, "*batch rank"]:
        """Return what the cache holds of each token besides the rotary key."""
        latent = inputs @ self.latent.mT
        if self.latent_norm is None:
            return latent
        return unit_size(latent) * self.latent_norm

    def heads_output(
        self, inputs: Float[Tensor, "batch tokens hidden"], frequencies: Float[Tensor, " slot"]
    ) -> Float[Tensor, "batch heads tokens value"]:
        """Run causal attention up to what each head puts out, before ``output``, at positions 0, 1, 2, …"""
        queried = inputs if self.query_down is None else inputs @ self.query_down.mT
        rope = torch.einsum("btx,hdx->bhtd", queried, self.query_rope)
        query = torch.cat(
            [torch.einsum("btx,hdx->bhtd", queried, self.query_nope), rotate_interleaved(rope, frequencies)], dim=-1
        )
        latent = self.latents(inputs)
        slots = rotate_interleaved(inputs @ self.key_rope.mT, frequencies)
        key = torch.cat(
            [torch.einsum("btr,hdr->bhtd", latent, self.key_up), slots.unsqueeze(1).expand(-1, len(rope[0]), -1, -1)],
            dim=-1,
        )
        value = torch.einsum("btr,hdr->bhtd", latent, self.value_up)
        # The fast kernels want values as wide as keys.
        size = value.shape[-1]
        value = pad(value, -1, max(size, key.shape[-1]))
        return scaled_dot_product_attention(query, key, value, is_causal=True, scale=self.softmax_scale)[..., :size]

    def attend(
        self, inputs: Float[Tensor, "batch tokens hidden"], frequencies: Float[Tensor, " slot"]
    ) -> Float[Tensor, "batch tokens hidden0"]:
        """Run causal attention: what the layer adds to the residual stream."""
        output = torch.einsum("bhtd,hxd->btx", self.heads_output(inputs, frequencies), self.output)
        return output if self.output_bias is None else output + self.output_bias

    def padded(self, sizes: MLASizes) -> "LatentAttention":
        """Pad with zeros up to ``sizes``; the function computed stays the same."""
        norm, rank = self.latent_norm, len(self.latent)
        if norm is not None:
            # The norm divides by the mean over all numbers, zeros included.
            norm = pad(norm * (rank / sizes.kv_lora_rank) ** 0.5, 0, sizes.kv_lora_rank)
        return replace(
            self,
            query_nope=pad(self.query_nope, 1, sizes.qk_nope_head_dim),
            latent=pad(self.latent, 0, sizes.kv_lora_rank),
            key_up=pad(pad(self.key_up, 1, sizes.qk_nope_head_dim), 2, sizes.kv_lora_rank),
            value_up=pad(pad(self.value_up, 1, sizes.v_head_dim), 2, sizes.kv_lora_rank),
            output=pad(self.output, 2, sizes.v_head_dim),
            latent_norm=norm,
        )
