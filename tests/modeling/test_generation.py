"""Every way of generating that Transformers has, with the tokens that its own form finds."""

import copy

import pytest
import torch
from tokenizers import Regex, Tokenizer
from tokenizers.decoders import Fuse
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Split
from transformers import PreTrainedTokenizerFast

from tests.modeling.models import VOCAB_SIZE, latent_model, some_ids, watched
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


@pytest.fixture(scope="module")
def letters():
    """A tokenizer that writes every token as one character."""
    made = Tokenizer(WordLevel({chr(ord("A") + token): token for token in range(VOCAB_SIZE)}, unk_token="A"))
    made.pre_tokenizer, made.decoder = Split(Regex("."), "isolated"), Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=made, unk_token="A", clean_up_tokenization_spaces=False)


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


def test_stop_strings(models, letters):
    """Transformers hands the tokenizer down to attention, where it decides nothing."""
    stock, absorbed = models
    ids = some_ids(1, 20)
    free = generate(stock, ids)
    stop = letters.decode(free[0, 24:27])
    found = generate(absorbed, ids, stop_strings=[stop], tokenizer=letters)
    assert torch.equal(found, generate(stock, ids, stop_strings=[stop], tokenizer=letters))
    assert found.shape[1] < free.shape[1]
