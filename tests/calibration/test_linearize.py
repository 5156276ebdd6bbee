"""What MLA has no place for: norms on heads, and in many engines biases on queries, keys and values."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from tests.convert.examples import HIDDEN, TOKENS, make_spec, randn, random_weights
from tests.convert.models import (
    asked,
    checkpoint_with_a_common_direction,
    convert_and_keep,
    difference,
    factor_logits,
    load,
    load_tensors,
    logits,
    plain_grid,
    read_config,
    rewritten,
    some_ids,
)
from tests.convert.naive import softmax_rows, source_logits
from tests.factory import tiny_checkpoint
from transmla.calibration.linearize import PROJECTIONS, nearest_linear, token_costs
from transmla.convert.plan import plan_conversion
from transmla.convert.run import convert
from transmla.errors import UsageError

SIZES = {"kv_lora_rank": 44, "qk_rope_head_dim": 16}


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return checkpoint_with_a_common_direction(tmp_path_factory.mktemp("source"), family="qwen2")


@pytest.fixture(scope="module")
def without_biases(tmp_path_factory):
    """The same model with its biases at zero."""
    folder = checkpoint_with_a_common_direction(tmp_path_factory.mktemp("silent"), family="qwen2")
    return rewritten(folder, lambda name, tensor: torch.zeros_like(tensor) if name.endswith("bias") else tensor)


@pytest.mark.parametrize("method", ["complex", "rorope"])
def test_folded_biases_need_no_place_and_do_nearly_what_they_did(
    source, without_biases, calibration_text, tmp_path, method
):
    found = {}
    for biases in ("keep", "fold"):
        output = tmp_path / biases
        convert(asked(source, output, calibration_text, method=method, biases=biases, **SIZES))
        found[biases] = logits(load(output), some_ids())
        config = read_config(output)
        assert config["attention_bias"] is (biases == "keep")
        assert config["q_lora_rank"] == (96 if biases == "keep" else None)
        assert any(name.endswith("bias") for name in load_tensors(output)) is (biases == "keep")
    source_logits = logits(load(source), some_ids())
    lost = (logits(load(without_biases), some_ids()) - source_logits).square().mean().sqrt()
    off = {biases: (each - source_logits).square().mean().sqrt() for biases, each in found.items()}
    assert off["fold"] < 0.6 * lost
    assert off["fold"] < 1.5 * off["keep"]


def test_the_maps_are_weighted_least_squares():
    inputs, wanted, cost = randn(5, 20, 8, seed=0), randn(5, 20, 6, seed=1), randn(5, 20, seed=4).abs()
    weights = {"q_proj": randn(6, 8, seed=2)}
    seen = [(inputs[:2], {"q_proj": wanted[:2]}), (inputs[2:], {"q_proj": wanted[2:]})]
    costs = [{"q_proj": cost[:2]}, {"q_proj": cost[2:]}]
    root = cost.flatten().sqrt().unsqueeze(-1)
    flat, made = inputs.flatten(0, 1) * root, wanted.flatten(0, 1) * root
    found = nearest_linear(seen, costs, weights)["q_proj"]
    expected = torch.linalg.lstsq(flat, made).solution.T
    assert difference(found, expected) < 1e-4  # a little is pulled, and products are in float32
    crude = nearest_linear(seen, costs, weights, ridge=1e12)["q_proj"]
    for row, weight, numbers in zip(crude, weights["q_proj"], made.T, strict=True):
        plain = flat @ weight
        assert difference(row, weight * (numbers @ plain) / (plain @ plain)) < 1e-4


def test_a_bias_becomes_a_functional_that_is_nearly_one():
    inputs, weight, bias = randn(5, 20, 8, seed=0), randn(6, 8, seed=2), randn(6, seed=3)
    inputs[..., 2] = 3 + 0.01 * randn(5, 20, seed=1)
    seen, alike = [(inputs, {"k_proj": inputs @ weight.T + bias})], [{"k_proj": torch.ones(5, 20).double()}]
    found = nearest_linear(seen, alike, {"k_proj": weight})["k_proj"]
    constant = torch.linalg.lstsq(inputs.flatten(0, 1), torch.ones(100, 1).double()).solution[:, 0]
    assert difference(found, weight + torch.outer(bias, constant)) < 1e-4
    assert (inputs @ constant - 1).abs().max() < 0.02


def test_a_token_counts_by_what_errors_there_cost():
    """p² for its values; for its logits p² times what moving from one value to another does to the output."""
    spec = replace(make_spec(heads=4, kv_heads=2, head_dim=6, hidden=HIDDEN), logit_scale=1.3)
    weights, x = random_weights(4, 2, 6), randn(TOKENS, HIDDEN, seed=9)
    wanted = torch.zeros(3, TOKENS, dtype=torch.float64)
    scaled = replace(weights, query=weights.query * spec.logit_scale)
    for head, logits_of_head in enumerate(source_logits(scaled, x, spec.frequencies.double())):
        values = x @ weights.value[head // 2].T
        for i, row in enumerate(softmax_rows(logits_of_head)):
            pooled = sum(p * values[j] for j, p in enumerate(row))
            for j, p in enumerate(row):
                cost = (p * (weights.output[head] @ (values[j] - pooled)).norm()) ** 2
                wanted[:, i] += torch.stack([cost, torch.zeros(()), torch.zeros(())])
                wanted[:, j] += torch.stack([torch.zeros(()), cost, torch.tensor(p**2)])
    made = {
        name: (x @ part.flatten(0, 1).T)[None]
        for name, part in zip(PROJECTIONS, (weights.query, weights.key, weights.value), strict=True)
    }
    [costs] = token_costs(spec, [(x[None], made)], weights.output_gram.float())
    for name, expected in zip(PROJECTIONS, wanted, strict=True):
        assert difference(costs[name][0], expected + 0.05 * expected.mean()) < 1e-4


@pytest.fixture(scope="module")
def normed(tmp_path_factory):
    return tiny_checkpoint(tmp_path_factory.mktemp("normed"), family="qwen3")


@pytest.mark.parametrize("choices", [{}, {"method": "rorope"}, {"heal_steps": 20}])
def test_a_norm_on_heads_becomes_a_linear_map(normed, calibration_text, tmp_path, choices):
    report, factors = convert_and_keep(normed, tmp_path / "out", calibration_text, **SIZES, **choices)
    ids = some_ids(1)[0]
    converted = load(tmp_path / "out")
    expected = factor_logits(normed, factors, plain_grid(read_config(tmp_path / "out")), ids)
    assert difference(logits(converted, ids[None])[0], expected) < 1e-4
    if not choices:
        # The crude answer, one factor for each number, is further off on text that neither has seen.
        options = {"linear_ridge": 1e12}
        crude = convert(asked(normed, tmp_path / "crude", calibration_text, **SIZES, method_options=options))
        assert report.mean_relative_error < 0.95 * crude.mean_relative_error


@pytest.mark.parametrize(
    ("choices", "message"),
    [
        ({"biases": "merge", "exact": True}, "--exact fits nothing: drop --biases"),
        ({"biases": "merge", "calibration": "none", **SIZES}, "find the nearest linear maps on: pass --calibration"),
        ({"engine": "llama.cpp", "exact": True}, "every rotary slot a frequency of its own"),
        ({"engine": "llama.cpp", "calibration": "none", **SIZES}, "no place for the biases of k_proj, q_proj, v_proj"),
    ],
)
def test_what_cannot_be_is_said_before_anything_is_read(source, tmp_path, choices, message):
    with pytest.raises(UsageError, match=message):
        plan_conversion(asked(source, tmp_path / "out", **choices))


@pytest.mark.parametrize(
    ("choices", "message"),
    [
        ({"exact": True}, "--exact is impossible for Qwen3, because MLA has no norm on queries and keys"),
        ({"calibration": "none", **SIZES}, "The norm on queries and keys needs a text"),
    ],
)
def test_a_norm_on_heads_has_no_exact_form(normed, tmp_path, choices, message):
    with pytest.raises(UsageError, match=message):
        plan_conversion(asked(normed, tmp_path / "out", **choices))


def test_a_bias_on_the_output_stays(calibration_text, tmp_path):
    source = tiny_checkpoint(tmp_path / "source", attention_bias=True)
    with pytest.raises(UsageError, match="bias on the output of attention: pass --biases keep"):
        plan_conversion(asked(source, tmp_path / "out", calibration_text, biases="merge", **SIZES))
