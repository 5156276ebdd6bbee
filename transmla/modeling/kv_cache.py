"""The KV cache of a model: its name, what it holds, and one that grows in place.

Transformers 5.24 changed the name: ``cache`` where it was ``past_key_values``.
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import Cache, PreTrainedConfig, PreTrainedModel
from transformers.cache_utils import CacheLayerMixin, DynamicLayer
from transformers.utils import ModelOutput

from transmla.errors import UnsupportedModelError

CACHE_NAMES = ("cache", "past_key_values")
"""The names of the argument and of the field, the newest first: asking for an old one warns."""


def cache_of(output: ModelOutput) -> Cache:
    """Return the cache that a forward pass, or ``generate``, left in its output.

    Raises:
        UnsupportedModelError: there is none.
    """
    for name in CACHE_NAMES:
        # By the fields, since newer outputs have the old name as a property that warns.
        if isinstance(cache := vars(output).get(name), Cache):
            return cache
    raise UnsupportedModelError(
        f"The model keeps no KV cache that could be measured or decoded on: {type(output).__name__} holds "
        f"{', '.join(output)}."
    )


def cache_argument(model: nn.Module) -> str:
    """Return the name of the argument by which a model takes its cache.

    Raises:
        UnsupportedModelError: it takes none.
    """
    parameters = inspect.signature(model.forward).parameters
    for name in CACHE_NAMES:
        if name in parameters:
            return name
    raise UnsupportedModelError(f"{type(model).__name__} takes no KV cache, so it cannot decode token by token.")


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


class PreallocatedLayer(DynamicLayer):
    """A cache layer with room for the tokens to come.

    Stock's layer makes a new tensor and copies all it holds at every step, which takes twice the memory traffic of the
    attention itself. Serving engines write new tokens into place, and so does this.
    """

    def __init__(self, room: tuple[Tensor, Tensor], num_tokens: int) -> None:
        super().__init__()
        self.lazy_initialization(*room)
        self._room = room
        self._show(num_tokens)

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: object, **kwargs: object
    ) -> tuple[Tensor, Tensor]:
        """Write new tokens after those that are there and return all."""
        start = self.get_seq_length()
        for room, new in zip(self._room, (key_states, value_states), strict=True):
            room[:, :, start : start + new.shape[-2]] = new
        self._show(start + key_states.shape[-2])
        return self.keys, self.values

    def _show(self, num_tokens: int) -> None:
        self.keys, self.values = (room[:, :, :num_tokens] for room in self._room)
