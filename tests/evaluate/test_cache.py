import copy

import torch

from transmla.evaluate.cache import CacheUse, measure_cache


def test_llama_caches_keys_and_values(llama):
    numbers = 2 * 2 * 10
    assert measure_cache(llama) == CacheUse(bytes_per_token=3 * numbers * 4, numbers_per_token_layer=float(numbers))


def test_deepseek_caches_a_latent_and_a_rotary_key(deepseek):
    numbers = 18 + 6
    assert measure_cache(deepseek) == CacheUse(bytes_per_token=2 * numbers * 4, numbers_per_token_layer=float(numbers))


def test_bytes_follow_the_dtype(deepseek):
    half = copy.deepcopy(deepseek).to(torch.bfloat16)
    assert measure_cache(half) == CacheUse(bytes_per_token=2 * 24 * 2, numbers_per_token_layer=24.0)
