"""The cache is found under the name that the installed Transformers gives it, without a warning."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn
from transformers import Cache, DynamicCache

from tests.modeling.models import latent_model, some_ids
from transmla.errors import UnsupportedModelError
from transmla.modeling.kv_cache import cache_argument, cache_of


@pytest.mark.parametrize("part", ["model", "decoder", "generate"])
def test_the_cache_of_an_output(part):
    model, ids = latent_model(), some_ids(1, 9)
    with torch.inference_mode():
        if part == "generate":
            output = model.generate(
                ids, attention_mask=torch.ones_like(ids), max_new_tokens=3, return_dict_in_generate=True
            )
        else:
            output = (model if part == "model" else model.get_decoder())(ids, use_cache=True)
    cache = cache_of(output)
    assert isinstance(cache, Cache)
    assert cache.get_seq_length() == (11 if part == "generate" else 9)


@torch.inference_mode()
def test_the_cache_that_is_handed_over_is_filled():
    model, cache = latent_model(), DynamicCache()
    model(some_ids(1, 9), **{cache_argument(model): cache})
    assert cache.get_seq_length() == 9


def test_no_cache_is_told():
    with torch.inference_mode():
        output = latent_model()(some_ids(1, 9), use_cache=False)
    with pytest.raises(UnsupportedModelError, match=r"keeps no KV cache .* holds logits"):
        cache_of(output)
    with pytest.raises(UnsupportedModelError, match="Linear takes no KV cache"):
        cache_argument(nn.Linear(2, 2))


def test_the_newest_name_wins():
    """A forward that still takes the old name beside the new one warns about the old."""
    model = SimpleNamespace(forward=lambda input_ids, past_key_values=None, cache=None: None)
    assert cache_argument(model) == "cache"
