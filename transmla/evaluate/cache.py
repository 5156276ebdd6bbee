"""What a model's KV cache holds, measured on the cache itself rather than read off a config."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import Cache, PreTrainedConfig, PreTrainedModel

from transmla.modeling.kv_cache import cache_of


@dataclass(frozen=True)
class CacheUse:
    """What one more token adds to the cache: bytes over all layers, numbers in the mean layer."""

    bytes_per_token: int
    numbers_per_token_layer: float


@torch.inference_mode()
def measure_cache(model: PreTrainedModel) -> CacheUse:
    """Run two short prompts and count what the longer one leaves in the cache beyond the shorter one.

    The difference drops whatever a cache layer holds whether or not there are tokens.
    """
    num_tokens = 4
    short, long = _cached_tensors(model, num_tokens), _cached_tensors(model, 2 * num_tokens)
    num_layers = model.config.num_hidden_layers
    num_bytes = sum(tensor.nbytes for tensor in long) - sum(tensor.nbytes for tensor in short)
    numbers = sum(tensor.numel() for tensor in long) - sum(tensor.numel() for tensor in short)
    return CacheUse(num_bytes // num_tokens, numbers / num_tokens / num_layers)


def _cached_tensors(model: PreTrainedModel, num_tokens: int) -> list[Tensor]:
    prompt = torch.arange(num_tokens, device=model.device)[None] % model.config.vocab_size
    return cached_tensors(cache_of(model.get_decoder()(input_ids=prompt, use_cache=True)))


def cached_tensors(cache: Cache) -> list[Tensor]:
    """Return every tensor that a cache holds, whatever its layers call them."""
    return [value for layer in cache.layers for value in vars(layer).values() if isinstance(value, Tensor)]


def computed_cache_numbers(config: PreTrainedConfig) -> int:
    """Return the numbers that a config says a token leaves in the caches of all layers.

    A latent and the rotary part of the keys with latent attention, else a key and a value for each of their heads.
    """
    if getattr(config, "kv_lora_rank", None) is not None:
        return config.num_hidden_layers * (config.kv_lora_rank + config.qk_rope_head_dim)
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return 2 * config.num_hidden_layers * config.num_key_value_heads * head_dim
