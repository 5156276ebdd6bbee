"""DeepSeek's attention modules, with a second way to compute the same.

Transformers caches the latent and the rotated key, as it should, but ``kv_b_proj`` expands every cached token for every
head at every step. The subclasses here attend to the latents as they lie in the cache wherever that takes fewer
multiplications: for a step of one token or of some. A long prompt is better expanded, in Transformers' own way.

They add no weights and keep nothing: both up-projections are views of ``kv_b_proj.weight``, and the cache is that of
Transformers. Whatever else is called by its name there (projections, rotations, attention, cache) is called here too.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers import Cache
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.deepseek_v2.modeling_deepseek_v2 import DeepseekV2Attention, apply_rotary_emb
from transformers.models.deepseek_v3.modeling_deepseek_v3 import (
    DeepseekV3Attention,
    apply_rotary_pos_emb,
    apply_rotary_pos_emb_interleave,
    eager_attention_forward,
)

from transmla.errors import UnsupportedModelError
from transmla.linalg.latent_attention import absorbing_is_cheaper, latent_attention
from transmla.modeling.kv_cache import CACHE_NAMES

# Transformers 5.24 renamed the cache, and still takes the old name; before, the paged cache had the new one.
_RENAMED = "cache" in inspect.signature(DeepseekV3Attention.forward).parameters
# Arguments that decide nothing in attention: what they ask for is done elsewhere, before or after it.
_IDLE = frozenset(
    {
        "position_ids",
        "use_cache",
        "return_dict",
        "num_items_in_batch",
        "output_attentions",
        "output_hidden_states",
        "output_router_logits",
        # ``generate`` leaves these among the model's own arguments.
        "tokenizer",
        "assistant_tokenizer",
    }
)
# Arguments that only the attention functions of Transformers understand.
_EXPANDED_ONLY = frozenset(
    {
        "is_causal",
        "seq_idx",
        "cu_seq_lens_q",
        "cu_seq_lens_k",
        "max_length_q",
        "max_length_k",
        "cu_seqlens",
        "block_table",
        "k_cache",
        "v_cache",
        "read_index",
        "write_index",
        "logits_indices",
        "sliding_window",
        "softcap",
        "s_aux",
        "position_bias",
    }
    | (frozenset() if _RENAMED else {"cache"})
)


class _AbsorbedAttention(nn.Module):
    """Comes before a class of Transformers, whose weights it uses."""

    config: Any
    layer_idx: int
    attention_dropout: float
    scaling: float
    q_lora_rank: int | None
    kv_lora_rank: int
    qk_nope_head_dim: int
    qk_rope_head_dim: int
    qk_head_dim: int
    v_head_dim: int
    q_proj: nn.Module
    q_a_proj: nn.Module
    q_a_layernorm: nn.Module
    q_b_proj: nn.Module
    kv_a_proj_with_mqa: nn.Module
    kv_a_layernorm: nn.Module
    kv_b_proj: nn.Linear
    o_proj: nn.Module
    expand_kv: Any

    def forward(
        self,
        hidden_states: Tensor,
        *,
        position_embeddings: Any,
        attention_mask: Any = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        """Return the layer's output and, as Transformers does with eager attention only, the attention weights.

        Raises:
            UnsupportedModelError: an argument that this form does not know, as newer releases may hand over.
        """
        cache = _take_cache(kwargs)
        given = _check_arguments(kwargs)
        if self.q_lora_rank is None:
            query = self.q_proj(hidden_states)
        else:
            query = self.q_b_proj(self.q_a_layernorm(self.q_a_proj(hidden_states)))
        query = query.unflatten(-1, (-1, self.qk_head_dim)).transpose(1, 2)
        query_nope, query_rope = query.split([self.qk_nope_head_dim, self.qk_rope_head_dim], -1)
        # The cache has an axis for heads, of which there is one.
        compressed = self.kv_a_proj_with_mqa(hidden_states)[:, None]
        latent, key_rope = compressed.split([self.kv_lora_rank, self.qk_rope_head_dim], -1)
        latent = self.kv_a_layernorm(latent)
        query_rope, key_rope = self._rotate(query_rope, key_rope, position_embeddings)
        if cache is not None:
            # A paged cache changes the arguments.
            extra: dict[str, Any] = {"kwargs": kwargs} if _RENAMED else {}
            latent, key_rope = cache.update(latent, key_rope, self.layer_idx, **extra)

        absorbs = not given and self._absorbs(attention_mask, query.shape[2], latent.shape[2])
        attend = self._absorbed if absorbs else self._expanded
        output, weights = attend(query_nope, query_rope, latent, key_rope, attention_mask, **kwargs)
        return self.o_proj(output.flatten(2)), weights

    def _rotate(self, query: Tensor, key: Tensor, position_embeddings: Any) -> tuple[Tensor, Tensor]:
        raise NotImplementedError

    def _absorbs(self, mask: Any, queries: int, tokens: int) -> bool:
        """Return whether the absorbed form is the better one, and can do what is asked."""
        # A prompt is all there is, though a static cache may have room for more: fused kernels skip what is masked.
        if queries > 1 and (mask is None or queries == tokens):
            return False
        return (
            absorbing_is_cheaper(
                queries=queries,
                tokens=tokens,
                rank=self.kv_lora_rank,
                nope=self.qk_nope_head_dim,
                rope=self.qk_rope_head_dim,
                value=self.v_head_dim,
            )
            and not (self.training and self.attention_dropout)
            and _understands(self.config._attn_implementation, mask, queries, tokens)
            and _is_plain(self.kv_b_proj)
        )

    def _absorbed(
        self, query_nope: Tensor, query_rope: Tensor, latent: Tensor, key_rope: Tensor, mask: Tensor | None, **_: Any
    ) -> tuple[Tensor, Tensor | None]:
        sizes = [self.qk_nope_head_dim, self.v_head_dim]
        up_key, up_value = self.kv_b_proj.weight.unflatten(0, (-1, sum(sizes))).split(sizes, 1)
        # Flash attention's mask has the batch and the tokens only.
        mask = mask[:, None, None] if mask is not None and mask.dim() == 2 else mask
        return latent_attention(
            query_nope,
            query_rope,
            latent.squeeze(1),
            key_rope.squeeze(1),
            up_key,
            up_value,
            mask,
            scale=self.scaling,
            keep_weights=self.config._attn_implementation == "eager",
        )

    def _expanded(
        self, query_nope: Tensor, query_rope: Tensor, latent: Tensor, key_rope: Tensor, mask: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor | None]:
        implementation = self.config._attn_implementation
        query, (key, value) = torch.cat((query_nope, query_rope), -1), self.expand_kv(latent, key_rope)
        if implementation == "sdpa" and query.device.type == "cpu":
            # The CPU's fused kernel wants heads of one size; without it all logits exist at once, and take far longer.
            size = max(self.qk_head_dim, self.v_head_dim)
            query, key, value = (nn.functional.pad(x, (0, size - x.shape[-1])) for x in (query, key, value))
        output, weights = ALL_ATTENTION_FUNCTIONS.get_interface(implementation, eager_attention_forward)(
            self,
            query,
            key,
            value,
            mask,
            dropout=self.attention_dropout if self.training else 0.0,
            scaling=self.scaling,
            **kwargs,
        )
        return output[..., : self.v_head_dim], weights


class AbsorbedDeepseekV3Attention(_AbsorbedAttention, DeepseekV3Attention):
    """DeepSeek-V3's attention, and what :mod:`transmla` writes."""

    def _rotate(self, query: Tensor, key: Tensor, position_embeddings: Any) -> tuple[Tensor, Tensor]:
        rotate = apply_rotary_pos_emb_interleave if self.config.rope_interleave else apply_rotary_pos_emb
        return rotate(query, key, *position_embeddings)


class AbsorbedDeepseekV2Attention(_AbsorbedAttention, DeepseekV2Attention):
    """DeepSeek-V2's attention, whose rotations are complex numbers."""

    def _rotate(self, query: Tensor, key: Tensor, position_embeddings: Any) -> tuple[Tensor, Tensor]:
        return apply_rotary_emb(query, key, position_embeddings.to(query.device))


def _take_cache(kwargs: dict[str, Any]) -> Cache | None:
    """Take the cache out of the arguments, by the name that this release of Transformers gives it."""
    names = CACHE_NAMES if _RENAMED else CACHE_NAMES[1:]
    return next((kwargs.pop(name) for name in names if name in kwargs), None)


def _check_arguments(kwargs: Mapping[str, Any]) -> bool:
    """Return whether an argument is given that only the attention functions of Transformers understand.

    Raises:
        UnsupportedModelError: an argument that is not known at all.
    """
    given = [name for name, value in kwargs.items() if value is not None and name not in _IDLE]
    for name in given:
        if name not in _EXPANDED_ONLY:
            raise UnsupportedModelError(
                f"Absorbed attention does not know the argument {name!r}, which attention is given by transformers "
                f"{transformers.__version__} or by the caller: leave it out, or compute in stock form (--stock, "
                "transmla.modeling.expand)."
            )
    return bool(given)


def _understands(implementation: str, mask: Any, queries: int, tokens: int) -> bool:
    """Return whether a mask means to us what it means to an attention implementation of Transformers."""
    if implementation in ("eager", "sdpa"):
        return mask is None or (
            isinstance(mask, Tensor) and mask.dim() == 4 and (mask.dtype == torch.bool or mask.is_floating_point())
        )
    # Flash attention has a mask of its own, which marks the tokens of each sequence.
    if "flash" in implementation and "paged" not in implementation and queries == 1:
        return mask is None or (mask.dtype == torch.bool and mask.dim() == 2 and mask.shape[1] == tokens)
    return False


def _is_plain(projection: nn.Module) -> bool:
    """Return whether the weight is all there is to a projection: no quantisation, adapter, shard, or hook of a user."""
    if type(projection) is not nn.Linear or projection.bias is not None:
        return False
    weight = projection.weight
    return (
        type(weight) in (nn.Parameter, Tensor)
        and weight.is_floating_point()
        and weight.itemsize > 1
        and not weight.is_meta
        and not (projection._forward_hooks or projection._forward_pre_hooks)
        and not (projection._backward_hooks or projection._backward_pre_hooks)
    )
