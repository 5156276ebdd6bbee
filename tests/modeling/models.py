"""Small random models with latent attention, in every shape that their configs allow, and ways to run them."""

from __future__ import annotations

import copy
from contextlib import contextmanager
from unittest.mock import patch

import torch
from transformers import DeepseekV2Config, DeepseekV3Config, DynamicCache, PreTrainedModel
from transformers.models.deepseek_v2.modeling_deepseek_v2 import DeepseekV2Attention
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3Attention

from tests.factory import random_model
from transmla.modeling import absorbed_attention as attention
from transmla.modeling.kv_cache import cache_argument

VOCAB_SIZE = 101
# Ranks are small beside the heads, as in models that are worth absorbing: then a few tokens are enough for it.
SIZES = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 48,
    "intermediate_size": 52,
    "num_hidden_layers": 2,
    "first_k_dense_replace": 2,
    "num_attention_heads": 3,
    "num_key_value_heads": 3,
    "q_lora_rank": None,
    "kv_lora_rank": 8,
    "qk_rope_head_dim": 6,
    "qk_nope_head_dim": 10,
    "v_head_dim": 14,
    "max_position_embeddings": 256,
    "bos_token_id": 0,
    "eos_token_id": None,
    "pad_token_id": 0,
}
YARN = {
    "rope_type": "yarn",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "original_max_position_embeddings": 64,
    "mscale": 0.8,
    "mscale_all_dim": 0.7,
}
EXPERTS = {
    "first_k_dense_replace": 1,
    "n_routed_experts": 4,
    "n_shared_experts": 1,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 20,
    "n_group": 1,
    "topk_group": 1,
}
VARIANTS = {
    "v3": (DeepseekV3Config, {}),
    "v3-biases": (DeepseekV3Config, {"q_lora_rank": 12, "attention_bias": True}),
    "v3-exact": (DeepseekV3Config, {"qk_nope_head_dim": 0}),
    "v3-halves": (DeepseekV3Config, {"rope_interleave": False}),
    "v3-yarn": (DeepseekV3Config, {"rope_parameters": YARN}),
    "v3-experts": (DeepseekV3Config, EXPERTS),
    "v2": (DeepseekV2Config, {}),
    "v2-biases": (DeepseekV2Config, {"q_lora_rank": 12, "attention_bias": True}),
    "v2-yarn": (DeepseekV2Config, {"rope_parameters": YARN}),
}


def latent_model(variant: str = "v3", *, dtype: torch.dtype = torch.float32, **overrides) -> PreTrainedModel:
    config_class, fields = VARIANTS[variant]
    config = config_class(**copy.deepcopy({**SIZES, **fields, "dtype": dtype, **overrides}))
    return random_model(config, seed=3)


def some_ids(batch: int, tokens: int) -> torch.Tensor:
    return torch.randint(1, VOCAB_SIZE, (batch, tokens), generator=torch.Generator().manual_seed(7))


@torch.inference_mode()
def stepwise(model, ids, steps, *, cache=None, mask=None) -> torch.Tensor:
    """Return the logits of a text that comes in so many tokens at a time; the mask is that of the whole text."""
    cache = DynamicCache(config=model.config) if cache is None else cache
    positions = None if mask is None else (mask.cumsum(1) - 1).clamp(min=0)
    logits, start = [], 0
    for step in steps:
        some = slice(start, start + step)
        extra = {} if mask is None else {"attention_mask": mask[:, : some.stop], "position_ids": positions[:, some]}
        logits.append(model(ids[:, some], **{cache_argument(model): cache}, **extra).logits)
        start += step
    return torch.cat(logits, 1)


@contextmanager
def watched():
    """Count the calls of both forms: ``absorbed`` attends to latents, ``expanded`` makes keys and values of them."""
    calls = {"absorbed": 0, "expanded": 0}

    def counting(form, function):
        def counted(*args, **kwargs):
            calls[form] += 1
            return function(*args, **kwargs)

        return counted

    with (
        patch.object(attention, "latent_attention", counting("absorbed", attention.latent_attention)),
        patch.object(DeepseekV3Attention, "expand_kv", counting("expanded", DeepseekV3Attention.expand_kv)),
        patch.object(DeepseekV2Attention, "expand_kv", counting("expanded", DeepseekV2Attention.expand_kv)),
    ):
        yield calls
