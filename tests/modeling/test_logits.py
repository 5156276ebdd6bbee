"""Absorbed models give the logits that Transformers' own form gives, however a text comes in."""

import copy

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import DynamicCache, StaticCache

from tests.modeling.models import VARIANTS, latent_model, some_ids, stepwise, watched
from transmla.modeling import absorb
from transmla.modeling.kv_cache import cache_argument

TOLERANCE = 1e-4  # measured 4e-6
LAYERS = 2


def assert_close(found, expected, tolerance=TOLERANCE):
    assert expected.std() > 0.1
    torch.testing.assert_close(found, expected, rtol=0, atol=tolerance)


@pytest.fixture(scope="module", params=VARIANTS)
def stock(request):
    return latent_model(request.param)


@pytest.fixture(scope="module")
def absorbed(stock):
    return absorb(copy.deepcopy(stock))


def test_token_by_token(stock, absorbed):
    ids, steps = some_ids(2, 30), [20] + 10 * [1]
    with watched() as calls:
        found = stepwise(absorbed, ids, steps)
    # The prompt is expanded, steps never are.
    assert calls == {"absorbed": 10 * LAYERS, "expanded": LAYERS}
    assert_close(found, stepwise(stock, ids, steps))


@pytest.mark.parametrize("use_cache", [False, True])
def test_a_whole_text_is_expanded(stock, absorbed, use_cache):
    ids = some_ids(2, 30)
    with torch.inference_mode(), watched() as calls:
        found = absorbed(ids, use_cache=use_cache).logits
    assert calls == {"absorbed": 0, "expanded": LAYERS}
    with torch.inference_mode():
        assert_close(found, stock(ids).logits)


class Operators(TorchDispatchMode):
    """Note what is computed with."""

    def __init__(self):
        super().__init__()
        self.names = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.names.add(function.overloadpacket.__name__)
        return function(*args, **(kwargs or {}))


def test_expanded_tokens_take_the_fused_kernel():
    """Without it the logits of all queries would exist at once."""
    stock, ids = latent_model(kv_lora_rank=40), some_ids(2, 64)
    model, cache = absorb(copy.deepcopy(stock)), DynamicCache(config=stock.config)
    with torch.no_grad(), watched() as calls, Operators() as operators:
        found = [model(piece, **{cache_argument(model): cache}).logits for piece in ids.split(32, 1)]
    assert calls == {"absorbed": 0, "expanded": 2 * LAYERS}
    assert "_scaled_dot_product_flash_attention_for_cpu" in operators.names
    assert "_softmax" not in operators.names
    assert_close(torch.cat(found, 1), stepwise(stock, ids, [32, 32]))


def test_a_prompt_in_pieces(stock, absorbed):
    ids, steps = some_ids(2, 71), [40, 1, 7, 3, 20]
    with watched() as calls:
        found = stepwise(absorbed, ids, steps)
    assert calls["absorbed"] >= 3 * LAYERS
    assert_close(found, stepwise(stock, ids, steps))


@pytest.mark.parametrize("chunk", [1, 2])
def test_logits_of_few_queries_exist_at_once(stock, absorbed, chunk, monkeypatch):
    # 2 sequences, 3 heads, 47 tokens.
    monkeypatch.setattr("transmla.linalg.latent_attention.CPU_CHUNK_NUMBERS", chunk * 2 * 3 * 47)
    ids, steps = some_ids(2, 47), [42, 5]
    with watched() as calls:
        found = stepwise(absorbed, ids, steps)
    assert calls["absorbed"] == LAYERS
    assert_close(found, stepwise(stock, ids, steps))


def test_sequences_padded_on_the_left(stock, absorbed):
    ids, steps = some_ids(3, 40), [25, 4] + 11 * [1]
    mask = torch.ones_like(ids)
    mask[0, :9], mask[2, :3] = 0, 0
    with watched() as calls:
        found = stepwise(absorbed, ids, steps, mask=mask)
    assert calls["absorbed"] == 12 * LAYERS
    seen = mask.bool()
    assert found.isfinite().all()
    assert_close(found[seen], stepwise(stock, ids, steps, mask=mask)[seen])


def test_a_static_cache(stock, absorbed):
    ids, steps = some_ids(2, 34), [20, 4] + 10 * [1]

    def run(model, mask=None):
        return stepwise(model, ids, steps, cache=StaticCache(config=model.config, max_cache_len=48), mask=mask)

    with watched() as calls:
        found = run(absorbed)
    assert calls == {"absorbed": 11 * LAYERS, "expanded": LAYERS}
    assert_close(found, run(stock))
    mask = torch.ones_like(ids)
    mask[1, :5] = 0
    assert_close(run(absorbed, mask)[mask.bool()], run(stock, mask)[mask.bool()])


def test_eager_attention_gives_its_weights(stock, absorbed):
    ids = some_ids(2, 30)
    outputs = []
    for model in (stock, absorbed):
        model = copy.deepcopy(model)
        model.set_attn_implementation("eager")
        cache = DynamicCache(config=model.config)
        with torch.inference_mode(), watched() as calls:
            model(ids[:, :24], **{cache_argument(model): cache})
            outputs.append(model(ids[:, 24:], **{cache_argument(model): cache}, output_attentions=True))
    assert calls["absorbed"] == LAYERS
    expected, found = outputs
    assert_close(found.logits, expected.logits)
    assert len(found.attentions) == LAYERS
    for weights, others in zip(found.attentions, expected.attentions, strict=True):
        torch.testing.assert_close(weights, others, rtol=0, atol=1e-5)  # measured 5e-7


def test_custom_masks(stock, absorbed):
    ids = some_ids(2, 30)
    allowed = torch.ones(30, 30, dtype=torch.bool).tril()[None, None, 25:].repeat(2, 1, 1, 1)
    allowed[:, :, 1::2, 3:9] = False
    added = torch.zeros(allowed.shape).masked_fill(~allowed, torch.finfo(torch.float32).min)
    for mask in (allowed, added):
        logits = []
        for model in (stock, absorbed):
            cache = DynamicCache(config=model.config)
            with torch.inference_mode():
                model(ids[:, :25], **{cache_argument(model): cache})
                logits.append(model(ids[:, 25:], attention_mask=mask, **{cache_argument(model): cache}).logits)
        assert_close(logits[1], logits[0])


def test_the_cache_holds_the_latent_and_the_rotated_key(absorbed):
    cache = DynamicCache(config=absorbed.config)
    stepwise(absorbed, some_ids(2, 30), [20] + 10 * [1], cache=cache)
    rank, rope = absorbed.config.kv_lora_rank, absorbed.config.qk_rope_head_dim
    for layer in cache.layers:
        assert (layer.keys.shape, layer.values.shape) == ((2, 1, 30, rank), (2, 1, 30, rope))


def test_bfloat16():
    ids, steps = some_ids(2, 60), [40] + 20 * [1]
    exact = stepwise(latent_model(), ids, steps)
    half = latent_model(dtype=torch.bfloat16)
    error = (stepwise(half, ids, steps).float() - exact).abs().mean()
    found = stepwise(absorb(half), ids, steps)
    assert found.dtype == torch.bfloat16
    # Not closer to stock than bfloat16 is to the truth, but as close to the truth.
    assert (found.float() - exact).abs().mean() < 1.2 * error


def test_flex_attention_is_left_to_transformers():
    stock = latent_model()
    stock.set_attn_implementation("flex_attention")
    absorbed = absorb(copy.deepcopy(stock))
    assert not absorbed.model.layers[0].self_attn._absorbs(None, 1, 30)
