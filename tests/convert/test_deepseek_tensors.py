"""The neutralised latent norm, and what else changes on the way into DeepSeek-V3's tensors."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3RMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from tests.convert.examples import HIDDEN, TOKENS, fitted, frequencies, make_goal, randn, random_moments, random_weights
from tests.convert.naive import latent_attention, relative_error
from transmla.convert.deepseek_tensors import from_deepseek, to_deepseek
from transmla.convert.latent_attention import LatentAttention
from transmla.convert.methods.queries import compress_queries
from transmla.deepseek.neutral_norm import NORMS, residual_scale
from transmla.deepseek.sizes import MLASizes

HEADS, KV_HEADS, HEAD_DIM = 6, 2, 8
SLOTS = frequencies(HEAD_DIM)
SIZES = MLASizes(kv_lora_rank=12, qk_rope_head_dim=8, qk_nope_head_dim=8, v_head_dim=8)
PADDED = MLASizes(kv_lora_rank=20, qk_rope_head_dim=8, qk_nope_head_dim=14, v_head_dim=10)
PORTABLE, QUANTIZABLE = NORMS["portable"], NORMS["quantizable"]
WEIGHTS = random_weights(HEADS, KV_HEADS, HEAD_DIM)
BOUND = 3.0 * math.sqrt(HIDDEN)


@pytest.fixture(scope="module")
def layer():
    target = make_goal(SIZES.kv_lora_rank, SLOTS, SLOTS, folds=(1, 2, 4))
    return fitted(WEIGHTS, random_moments(WEIGHTS), target).attention


@pytest.fixture(scope="module")
def compressed(layer):
    return compress_queries(layer, random_moments(WEIGHTS), rank=9)


def fold(layer, sizes=SIZES, norm=PORTABLE, *, residual=1.0, moment=None, bound=BOUND):
    moment = random_moments(WEIGHTS).uniform if moment is None else moment
    return to_deepseek(layer, sizes, norm, input_moment=moment, input_bound=bound, residual=residual)


def normed(tensors, which, x, *, eps):
    """Run the stock norm, in its own float32 arithmetic, on what the stock projection gives it."""
    name = {"kv": "kv_a_proj_with_mqa", "q": "q_a_proj"}[which]
    weight = tensors[f"{which}_a_layernorm.weight"]
    norm = DeepseekV3RMSNorm(len(weight), eps=eps)
    norm.load_state_dict({"weight": weight.float()})
    with torch.no_grad():
        return norm((x @ tensors[f"{name}.weight"][: len(weight)].T).float()).double()


def inputs_of_length(length):
    x = randn(500, HIDDEN, seed=30)
    return x / x.norm(dim=-1, keepdim=True) * length


def worst_input(down):
    """Return the input of the largest length the norm in front lets through that makes the latent longest."""
    return torch.linalg.svd(down)[2][:1] * BOUND


@pytest.mark.parametrize("which", ["kv", "q"])
def test_portable_norm_passes_every_possible_latent(compressed, which):
    down = {"kv": compressed.latent, "q": compressed.query_down}[which]
    tensors = fold(compressed)
    for x in (inputs_of_length(BOUND), inputs_of_length(0.01 * BOUND), worst_input(down)):
        error = relative_error(normed(tensors, which, x, eps=1e-6), x @ down.T)
        assert error < PORTABLE.error + 2e-7  # 1e-6 promised; measured 4.5e-7 (worst input) in float32


def test_portable_error_is_the_one_predicted(layer):
    """Relative error mean(c²)/(2·eps), worked out in float64; it is promised to be below 1e-6."""
    tensors = fold(layer)
    x = worst_input(layer.latent)
    c = x @ tensors["kv_a_proj_with_mqa.weight"][: SIZES.kv_lora_rank].T
    weight = tensors["kv_a_layernorm.weight"]
    found = weight * c / (c.square().mean(-1, keepdim=True) + 1e-6).sqrt()
    error = relative_error(found, x @ layer.latent.T)
    assert error == pytest.approx(c.square().mean().item() / 2e-6, rel=1e-4)
    assert 2.4e-7 < error <= 1e-6  # the weight is a power of two, so a factor of up to four is left unused


def test_quantizable_norm_passes_the_average_latent(layer):
    x = randn(4000, HIDDEN, seed=31)
    moment = x.T @ x / len(x)
    tensors = fold(layer, norm=QUANTIZABLE, moment=moment)
    c = x @ tensors["kv_a_proj_with_mqa.weight"][: SIZES.kv_lora_rank].T
    assert c.square().mean().item() / 2 <= QUANTIZABLE.error
    error = relative_error(normed(tensors, "kv", x, eps=1.0), x @ layer.latent.T)
    assert error < 1.5 * QUANTIZABLE.error  # longer latents than the average weigh more; measured 7.0e-5
    # 8-bit blocks need rows that are not lost beside the rotary ones.
    portable = fold(layer, moment=moment)["kv_a_proj_with_mqa.weight"][: SIZES.kv_lora_rank]
    assert tensors["kv_a_proj_with_mqa.weight"][: SIZES.kv_lora_rank].norm() > 1000 * portable.norm()


@pytest.mark.parametrize("norm", [PORTABLE, QUANTIZABLE], ids=["portable", "quantizable"])
@pytest.mark.parametrize("scale", [1e-3, 1.0, 37.0])
def test_norm_weight_is_a_power_of_two_in_every_storage_type(compressed, norm, scale):
    tensors = fold(replace(compressed, latent=compressed.latent * scale), norm=norm)
    for name in ("kv_a_layernorm.weight", "q_a_layernorm.weight"):
        weight = tensors[name]
        assert (weight == weight[0]).all()
        assert math.frexp(weight[0].item())[0] == 0.5
        assert torch.equal(weight.to(torch.bfloat16).double(), weight.double())


def test_a_latent_of_zeros_stays_zero(layer):
    tensors = fold(replace(layer, latent=torch.zeros_like(layer.latent)))
    assert all(tensor.isfinite().all() for tensor in tensors.values())
    assert not normed(tensors, "kv", inputs_of_length(BOUND), eps=1e-6).any()


@pytest.mark.parametrize("eps", [1e-5, 1e-6, 1e-8])
@pytest.mark.parametrize("norm", [PORTABLE, QUANTIZABLE], ids=["portable", "quantizable"])
def test_rescaled_residual_stream_gives_the_same_norm(norm, eps):
    """The stock norm of the source on x, and at the target's eps on s·x, in float32 for sizes from 1e-4 to 1e2."""
    source, target = (LlamaRMSNorm(HIDDEN, eps=value) for value in (eps, norm.eps))
    x = torch.randn(60, HIDDEN, generator=torch.Generator().manual_seed(0)) * torch.logspace(-4, 2, 60).unsqueeze(-1)
    scale = residual_scale(eps, norm)
    torch.testing.assert_close(target(scale * x), source(x), rtol=1e-6, atol=0)  # measured 3e-7
    assert scale == 1 if eps == norm.eps else scale != 1


def unfolded(tensors, sizes, residual):
    """Read DeepSeek-V3's tensors back into plain factors, taking the norm for the constant it is meant to be."""
    gain = tensors["kv_a_layernorm.weight"] / 1e-3
    key_up, value_up = (
        tensors["kv_b_proj.weight"].unflatten(0, (HEADS, -1)).split([sizes.qk_nope_head_dim, sizes.v_head_dim], dim=1)
    )
    latent, key_rope = tensors["kv_a_proj_with_mqa.weight"].split([sizes.kv_lora_rank, sizes.qk_rope_head_dim])
    if "q_proj.weight" in tensors:
        query, down = tensors["q_proj.weight"], None
    else:
        down = tensors["q_a_proj.weight"] * (tensors["q_a_layernorm.weight"] / 1e-3).unsqueeze(-1)
        query = tensors["q_b_proj.weight"]
    query_nope, query_rope = query.unflatten(0, (HEADS, -1)).split([sizes.qk_nope_head_dim, sizes.qk_rope_head_dim], 1)
    return LatentAttention(
        query_nope=query_nope,
        query_rope=query_rope,
        query_down=down,
        latent=latent * gain.unsqueeze(-1),
        key_rope=key_rope,
        key_up=key_up,
        value_up=value_up,
        output=tensors["o_proj.weight"].unflatten(1, (HEADS, -1)).movedim(1, 0) / residual,
        softmax_scale=sizes.qk_head_dim**-0.5,
    )


@pytest.mark.parametrize("low_rank_queries", [False, True])
@pytest.mark.parametrize("sizes", [SIZES, PADDED], ids=["plain", "padded"])
def test_folding_and_padding_keep_the_function(layer, compressed, sizes, low_rank_queries):
    """At any head size, with the engine's own softmax scale of that size."""
    layer, x = compressed if low_rank_queries else layer, randn(TOKENS, HIDDEN, seed=9)
    tensors = fold(layer, sizes, residual=0.3)
    found = latent_attention(unfolded(tensors, sizes, 0.3), x, SLOTS)
    assert relative_error(found, latent_attention(layer, x, SLOTS)) < 1e-10  # measured 4e-16


def test_tensors_have_the_stock_names_and_shapes(compressed, layer):
    shapes = {name: tuple(tensor.shape) for name, tensor in fold(layer, PADDED).items()}
    common = {
        "kv_a_proj_with_mqa.weight": (28, HIDDEN),
        "kv_a_layernorm.weight": (20,),
        "kv_b_proj.weight": (HEADS * (14 + 10), 20),
        "o_proj.weight": (HIDDEN, HEADS * 10),
    }
    assert shapes == {**common, "q_proj.weight": (HEADS * (14 + 8), HIDDEN)}
    shapes = {name: tuple(tensor.shape) for name, tensor in fold(compressed, PADDED).items()}
    queries = {"q_a_proj.weight": (9, HIDDEN), "q_a_layernorm.weight": (9,), "q_b_proj.weight": (HEADS * 22, 9)}
    assert shapes == {**common, **queries}


@pytest.mark.parametrize("norm", [PORTABLE, QUANTIZABLE])
@pytest.mark.parametrize("sizes", [SIZES, PADDED])
@pytest.mark.parametrize("low_rank_queries", [False, True])
def test_what_was_folded_unfolds_to_the_same_attention(request, norm, sizes, low_rank_queries):
    layer = request.getfixturevalue("compressed" if low_rank_queries else "layer")
    sizes = replace(sizes, q_lora_rank=9 if low_rank_queries else None)
    unfolded = from_deepseek(fold(layer, sizes, norm, residual=0.3), sizes, norm, residual=0.3)
    assert unfolded.latent.shape == (sizes.kv_lora_rank, HIDDEN)
    x = randn(TOKENS, HIDDEN, seed=31)
    error = relative_error(latent_attention(unfolded, x, SLOTS), latent_attention(layer, x, SLOTS))
    assert error < 1e-12  # measured 1e-15
