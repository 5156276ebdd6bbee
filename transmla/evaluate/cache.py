"""What a model's KV cache holds, measured on the cache itself rather than read off a config."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import Cache, PreTrainedConfig, PreTrainedModel
from transformers.cache_utils import CacheLayerMixin

from transmla.errors import UnsupportedModelError
from transmla.modeling.kv_cache import cache_of


@dataclass(frozen=True)
class CacheUse:
    """What one more token adds to the cache: bytes over all layers, numbers in the mean layer."""

    bytes_per_token: int
    numbers_per_token_layer: float


@torch.inference_mode()
def measure_cache(model: PreTrainedModel) -> CacheUse:
    """Run a short prompt and look at what it leaves in the cache.

    Raises:
        UnsupportedModelError: nothing.
    """
    prompt = torch.arange(8, device=model.device)[None] % model.config.vocab_size
    return use_of_cache(cache_of(model.get_decoder()(input_ids=prompt, use_cache=True)), model.config)


def use_of_cache(cache: Cache, config: PreTrainedConfig) -> CacheUse:
    """Return what one token takes in a cache that a model has filled.

    It is the size of the places for tokens, and not how many there are: a static cache has room for more tokens than
    have come, and a sliding window has let some of them go.

    Raises:
        UnsupportedModelError: there is no place for a token.
    """
    places = [place for layer in cache.layers for place in _places(layer)]
    if not places:
        raise UnsupportedModelError(
            f"{type(cache).__name__} holds no keys and values after tokens have been read: this version of "
            "transformers, or this model, keeps them elsewhere, and what a token takes cannot be measured."
        )
    numbers = [place.numel() // (place.shape[0] * place.shape[-2]) for place in places]
    num_bytes = sum(number * place.itemsize for number, place in zip(numbers, places, strict=True))
    return CacheUse(num_bytes, sum(numbers) / config.num_hidden_layers)


def _places(layer: CacheLayerMixin) -> list[Tensor]:
    """Return the tensors of a layer whose last axis but one is that of the tokens, as that of the keys is."""
    keys = getattr(layer, "keys", None)
    if not isinstance(keys, Tensor) or keys.dim() < 3 or not keys.shape[-2]:
        return []
    tensors = [tensor for tensor in vars(layer).values() if isinstance(tensor, Tensor)]
    return [tensor for tensor in tensors if tensor.dim() >= 3 and tensor.shape[-2] == keys.shape[-2]]


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
