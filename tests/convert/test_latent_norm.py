"""A latent norm that is a real one: what it does to the layer, on disk, in stock transformers and in 8 bits."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from tests.convert.examples import HIDDEN, TOKENS, fitted, frequencies, make_goal, randn, random_moments, random_weights
from tests.convert.models import (
    asked,
    checkpoint_with_a_common_direction,
    contents,
    convert_and_keep,
    difference,
    factor_logits,
    interrupt_after,
    load,
    load_tensors,
    logits,
    plain_grid,
    read_config,
    some_ids,
)
from tests.convert.naive import latent_attention, relative_error, rms_norm
from transmla.convert.deepseek_tensors import from_deepseek, to_deepseek
from transmla.convert.fit.heal import heal_layer
from transmla.convert.fit.latent_norm import fitted_norm
from transmla.convert.fit.targets import LayerTargets
from transmla.convert.plan import plan_conversion
from transmla.convert.run import convert
from transmla.deepseek.neutral_norm import NORMS
from transmla.deepseek.sizes import MLASizes
from transmla.errors import UsageError

HEADS, KV_HEADS, HEAD_DIM, RANK, WINDOWS = 6, 2, 8, 9, 40
THETA = frequencies(HEAD_DIM)
WEIGHTS = random_weights(HEADS, KV_HEADS, HEAD_DIM)
SIZES = MLASizes(kv_lora_rank=RANK + 1, qk_rope_head_dim=8, qk_nope_head_dim=8, v_head_dim=8)
PADDED = MLASizes(kv_lora_rank=20, qk_rope_head_dim=8, qk_nope_head_dim=14, v_head_dim=10)
ASKED = {"kv_lora_rank": 24, "qk_rope_head_dim": 8, "latent_norm": "fitted"}


@pytest.fixture(scope="module")
def plain():
    return fitted(WEIGHTS, random_moments(WEIGHTS), make_goal(RANK, THETA, THETA, folds=(2,))).attention


def targets(inputs, outputs=None):
    return LayerTargets(inputs, inputs if outputs is None else outputs, torch.ones(inputs.shape[:2]).double())


def seen_by(inputs):
    return targets(inputs), torch.einsum("btx,bty->xy", inputs, inputs) / inputs[..., 0].numel()


def near_constant(noise):
    """Return windows with a coordinate that is nearly the same for every token."""
    inputs = randn(WINDOWS, TOKENS, HIDDEN, seed=50)
    inputs[..., 3] = 2 + noise * randn(WINDOWS, TOKENS, seed=51)
    return inputs


@pytest.fixture(scope="module")
def normed(plain):
    return fitted_norm(plain, *seen_by(near_constant(0.1)), batch_size=7)


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return checkpoint_with_a_common_direction(tmp_path_factory.mktemp("source"))


@pytest.fixture
def output(tmp_path):
    return tmp_path / "out"


@pytest.mark.parametrize(("noise", "most"), [(0.0, 0.02), (0.1, 0.1), (0.3, 0.3)])
def test_the_error_is_the_one_of_the_anchor(plain, noise, most):
    """The nearer a functional of the input is to a constant, the less a norm does to keys and values."""
    seen, unseen = near_constant(noise).split([30, 10])
    layer = fitted_norm(plain, *seen_by(seen), batch_size=7)
    assert layer.latent.shape == (RANK + 1, HIDDEN)
    error = relative_error(layer.attend(unseen, THETA), plain.attend(unseen, THETA))
    assert error < most  # measured 0.014, 0.058, 0.20
    # A norm with a weight and nothing else takes the sizes of keys and values away.
    bare = replace(plain, latent_norm=(seen @ plain.latent.T).square().mean((0, 1)).sqrt())
    assert error < relative_error(bare.attend(unseen, THETA), plain.attend(unseen, THETA))


def test_it_attends_as_the_double_loop(normed):
    x = near_constant(0.1)[0]
    # RoPE's tables are in float32: measured 4e-8.
    assert relative_error(normed.attend(x.unsqueeze(0), THETA)[0], latent_attention(normed, x, THETA)) < 1e-6


def test_the_eps_of_an_engine_does_not_matter(normed):
    c = near_constant(0.1)[0] @ normed.latent.T
    norms = [rms_norm(c, normed.latent_norm, eps) for eps in (0.0, 1e-6, 1e-5)]
    assert relative_error(norms[1], norms[0]) < 1e-6
    assert relative_error(norms[2], norms[0]) < 1e-5


@pytest.mark.parametrize("sizes", [SIZES, PADDED])
def test_what_was_folded_unfolds_to_the_same_attention(normed, sizes):
    moment = torch.eye(HIDDEN).double()
    tensors = to_deepseek(normed, sizes, NORMS["portable"], input_moment=moment, input_bound=1.0, residual=0.3)
    unfolded = from_deepseek(tensors, sizes, NORMS["portable"], residual=0.3, own_norm=True)
    assert unfolded.latent.shape == (sizes.kv_lora_rank, HIDDEN)
    x = near_constant(0.1)[0]
    # Zeros make the mean square smaller beside the eps: measured 5e-7.
    assert relative_error(latent_attention(unfolded, x, THETA), latent_attention(normed, x, THETA)) < 2e-6


def test_healing_trains_the_norm_as_well(plain, normed):
    inputs = near_constant(0.1)
    other = plain.map(lambda factor: factor * (1 + 0.3 * randn(*factor.shape, seed=52)))
    taught = targets(inputs, other.attend(inputs, THETA))
    healed, _ = heal_layer(normed, taught, THETA, steps=60, batch_size=8, seed=0)
    assert taught.loss(healed, THETA) < 0.3 * taught.loss(normed, THETA)  # measured 0.095
    assert not torch.equal(healed.latent_norm, normed.latent_norm)


@pytest.mark.parametrize("choices", [{}, {"q_lora_rank": 20}, {"heal_steps": 3}], ids=lambda choices: "-".join(choices))
def test_stock_transformers_computes_it(choices, source, output, calibration_text):
    report, factors = convert_and_keep(source, output, calibration_text, **ASKED, **choices)
    assert all(layer.latent_norm is not None for layer in factors)
    assert all(0 < layer.relative_error < 1 for layer in report.layers)
    ids = some_ids(1)[0]
    expected = factor_logits(source, factors, plain_grid(read_config(output)), ids)
    assert difference(logits(load(output), ids[None])[0], expected) < 1e-4  # measured 2e-6


def test_eight_bits_hold_it(source, tmp_path, calibration_text):
    """Round every projection to llama.cpp's q8_0: the neutralised rows are lost, these are not."""
    ids, changes = some_ids(1), {}
    for norm in ("neutral", "fitted"):
        convert(asked(source, tmp_path / norm, calibration_text, **(ASKED | {"latent_norm": norm})))
        model = load(tmp_path / norm)
        before = logits(model, ids)
        for layer in model.model.layers:
            for projection in (layer.self_attn.kv_a_proj_with_mqa, layer.self_attn.kv_b_proj):
                projection.weight.data = q8_0(projection.weight.data)
        changes[norm] = difference(logits(model, ids), before)
    assert changes["fitted"] < 0.1  # measured 0.062, neutral 4.8
    assert changes["fitted"] < 0.1 * changes["neutral"]


def q8_0(weight):
    """Blocks of up to 32 numbers along a row, a float16 scale each."""
    blocks = []
    for block in weight.split(32, dim=1):
        scale = block.abs().amax(1, keepdim=True) / 127
        rounded = torch.where(scale > 0, block / scale, 0.0).round()
        blocks.append(rounded * scale.half().float())
    return torch.cat(blocks, dim=1)


def test_float16_holds_it(source, output, tmp_path, calibration_text):
    convert(asked(source, output, calibration_text, **ASKED, dtype="float16"))
    tensors = load_tensors(output, dtype=None)
    assert {tensor.dtype for tensor in tensors.values()} == {torch.float16}
    convert(asked(source, tmp_path / "full", calibration_text, **ASKED))
    ids = some_ids(1)
    assert difference(logits(load(output), ids), logits(load(tmp_path / "full"), ids)) < 0.1  # measured 0.012


def test_resumed_it_is_the_same(source, tmp_path, calibration_text, monkeypatch):
    """The norm is read back from what is stored."""
    outputs = [tmp_path / name / "out" for name in ("undisturbed", "resumed")]
    convert(asked(source, outputs[0], calibration_text, **ASKED))
    request = asked(source, outputs[1], calibration_text, **ASKED)
    with monkeypatch.context() as patch:
        interrupt_after(patch, 1, KeyboardInterrupt())
        with pytest.raises(KeyboardInterrupt):
            convert(request)
    convert(request, resume=True)
    assert contents(outputs[1]) == contents(outputs[0])


@pytest.mark.parametrize(
    ("choices", "message"),
    [
        ({"exact": True}, "--exact fits nothing: drop --latent-norm"),
        ({"method": "rorope"}, "--latent-norm fitted needs --method fitted and a text"),
        ({"calibration": "none"}, "--latent-norm fitted needs --method fitted and a text"),
        ({"profile": "quantizable"}, "pass --profile portable"),
        ({"kv_lora_rank": 1}, "takes one latent number, .*: pass --kv-lora-rank 2"),
        ({"dtype": "float16", "q_lora_rank": 8}, "--latent-norm fitted without --q-lora-rank"),
    ],
)
def test_what_it_cannot_be_combined_with(choices, message, source, output, calibration_text):
    sizes = {} if "exact" in choices else ASKED
    text = None if choices.get("exact") else calibration_text
    with pytest.raises(UsageError, match=message):
        plan_conversion(asked(source, output, text, **(sizes | {"latent_norm": "fitted"} | choices)))
