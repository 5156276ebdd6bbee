"""Every way of generating that Transformers has, with the tokens that its own form finds."""

import copy

import pytest
import torch

from tests.modeling.models import latent_model, some_ids, watched
from transmla.modeling import absorb

TOKENS = 24
WAYS = {
    "greedy": {},
    "static cache": {"cache_implementation": "static", "disable_compile": True},
    "beam search": {"num_beams": 3, "num_return_sequences": 2},
    "sampling": {"do_sample": True, "temperature": 0.9, "top_k": 20, "num_return_sequences": 2},
    "no cache": {"use_cache": False},
    "chunked prompt": {"prefill_chunk_size": 8},
}


@pytest.fixture(scope="module", params=["v3", "v2"])
def models(request):
    stock = latent_model(request.param)
    return stock, absorb(copy.deepcopy(stock))


def generate(model, ids, **options):
    torch.manual_seed(11)
    mask = torch.ones_like(ids)
    if len(ids) > 1:
        mask[0, :4] = 0
    options = {"max_new_tokens": TOKENS, "do_sample": False, "pad_token_id": 0, **options}
    return model.generate(ids, attention_mask=mask, **options)


@pytest.mark.parametrize("way", WAYS)
def test_a_batch_with_padding(models, way):
    stock, absorbed = models
    ids = some_ids(2, 20)
    with watched() as calls:
        found = generate(absorbed, ids, **WAYS[way])
    assert torch.equal(found, generate(stock, ids, **WAYS[way]))
    assert (calls["absorbed"] >= TOKENS) == (way != "no cache")


def test_an_assistant_drafts(models):
    stock, absorbed = models
    ids, assistant = some_ids(1, 20), absorb(latent_model(num_hidden_layers=1, first_k_dense_replace=1))
    with watched() as calls:
        found = generate(absorbed, ids, assistant_model=assistant)
    assert torch.equal(found, generate(stock, ids))
    # A draft that is refused is cut out of the cache, and an accepted one is checked in the absorbed form.
    assert calls["absorbed"] > TOKENS


def test_an_absorbed_model_drafts_for_itself(models):
    stock, absorbed = models
    ids = some_ids(1, 20)
    assert torch.equal(generate(absorbed, ids, assistant_model=absorbed), generate(stock, ids))


def test_drafts_are_looked_up_in_the_prompt(models):
    stock, absorbed = models
    ids = some_ids(1, 8).repeat(1, 4)
    found = generate(absorbed, ids, prompt_lookup_num_tokens=4)
    assert torch.equal(found, generate(stock, ids))
