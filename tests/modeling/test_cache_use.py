import copy

import pytest
import torch
from transformers import DynamicCache, MistralConfig, MistralForCausalLM, StaticCache

from transmla.bench.timing import cache_nbytes
from transmla.errors import UnsupportedModelError
from transmla.modeling.kv_cache import CacheUse, cache_argument, measure_cache, use_of_cache


def test_llama_caches_keys_and_values(llama):
    numbers = 2 * 2 * 10
    assert measure_cache(llama) == CacheUse(bytes_per_token=3 * numbers * 4, numbers_per_token_layer=float(numbers))


def test_deepseek_caches_a_latent_and_a_rotary_key(deepseek):
    numbers = 18 + 6
    assert measure_cache(deepseek) == CacheUse(bytes_per_token=2 * numbers * 4, numbers_per_token_layer=float(numbers))


def test_bytes_follow_the_dtype(deepseek):
    half = copy.deepcopy(deepseek).to(torch.bfloat16)
    assert measure_cache(half) == CacheUse(bytes_per_token=2 * 24 * 2, numbers_per_token_layer=24.0)


@pytest.mark.parametrize("num_tokens", [3, 20])
def test_a_static_cache_has_room_that_is_not_counted(deepseek, num_tokens):
    cache = StaticCache(config=deepseek.config, max_cache_len=64)
    fill(deepseek, cache, num_tokens)
    assert use_of_cache(cache, deepseek.config) == measure_cache(deepseek)
    assert cache_nbytes(cache) > 3 * num_tokens * measure_cache(deepseek).bytes_per_token


@pytest.mark.parametrize("num_tokens", [3, 20])
@pytest.mark.parametrize("static", [False, True])
def test_a_sliding_window_lets_tokens_go_that_are_counted(num_tokens, static):
    torch.manual_seed(0)
    config = MistralConfig(
        vocab_size=50, hidden_size=32, intermediate_size=32, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, sliding_window=6, max_position_embeddings=64,
    )  # fmt: skip
    model = MistralForCausalLM(config).eval()
    cache = StaticCache(config=config, max_cache_len=64) if static else DynamicCache(config=config)
    fill(model, cache, num_tokens)
    expected = CacheUse(bytes_per_token=2 * 2 * 2 * 8 * 4, numbers_per_token_layer=32.0)
    assert use_of_cache(cache, config) == measure_cache(model) == expected


def test_nothing_cached_is_told(deepseek):
    """As when a layer is given its cache under a name that it does not know."""
    with pytest.raises(UnsupportedModelError, match="DynamicCache holds no keys and values after tokens have been"):
        use_of_cache(DynamicCache(config=deepseek.config), deepseek.config)


@torch.inference_mode()
def fill(model, cache, num_tokens):
    tokens = torch.arange(num_tokens)[None] % 50
    for token in tokens.split(1, dim=1):
        model(token, **{cache_argument(model): cache})
