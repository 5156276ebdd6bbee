"""Sources whose frequencies are not plain: scaled, stretched, or good for short contexts only."""

from __future__ import annotations

import pytest
import torch

from tests.arch.test_spec import LONG, LONG_PHI3, ROPE
from tests.convert.models import (
    asked,
    convert_and_keep,
    difference,
    factor_logits,
    load,
    logits,
    plain_grid,
    read_config,
    some_ids,
)
from tests.factory import tiny_checkpoint
from transmla.convert.run import convert

SIZES = {"kv_lora_rank": 44, "qk_rope_head_dim": 16}
SCALED = {name: {"rope_parameters": ROPE[name]} for name in ("linear", "dynamic", "yarn", "llama3")}
BOUNDED = {
    "longrope": {"rope_parameters": LONG},
    "Phi-3's longrope": {"family": "phi3", **LONG_PHI3},
    "sliding window": {"family": "mistral", "sliding_window": 64},
    "layers with a window": {"family": "ministral", "sliding_window": 64},
}


@pytest.mark.parametrize("name", SCALED | BOUNDED)
def test_exact_logits_are_the_sources(tmp_path, name):
    bound = {"max_position_embeddings": 64} if name in BOUNDED else {}
    source = tiny_checkpoint(tmp_path / "source", **(SCALED | BOUNDED)[name])
    convert(asked(source, tmp_path / "out", exact=True, **bound))
    assert read_config(tmp_path / "out")["max_position_embeddings"] == (64 if bound else 512)
    ids = some_ids(tokens=64 if bound else 320)
    assert difference(logits(load(tmp_path / "out"), ids), logits(load(source), ids)) < 1e-4  # measured 9e-6


@pytest.mark.parametrize("name", ["linear", "yarn"])
def test_a_raised_context_is_exact_to_its_end(tmp_path, name):
    """As cards say: config.json keeps the context of the training, and the scaled positions reach four times as far."""
    rope = ROPE[name] | {"factor": 4.0} | ({"original_max_position_embeddings": 96} if name == "yarn" else {})
    source = tiny_checkpoint(tmp_path / "source", rope_parameters=rope, max_position_embeddings=96)
    convert(asked(source, tmp_path / "out", exact=True, max_position_embeddings=384))
    assert read_config(tmp_path / "out")["max_position_embeddings"] == 384
    ids = some_ids(tokens=384)
    assert difference(logits(load(tmp_path / "out"), ids), logits(load(source), ids)) < 1e-4  # measured 1e-5


@pytest.mark.parametrize("name", SCALED | BOUNDED)
def test_other_frequencies_are_fitted_onto_the_plain_grid(calibration_text, tmp_path, name):
    """With a cache as large as the source's, little is lost, though the slots turn at other frequencies."""
    bound = {"max_position_embeddings": 64} if name in BOUNDED else {}
    source = tiny_checkpoint(tmp_path / "source", **(SCALED | BOUNDED)[name])
    half = 16 if name == "Phi-3's longrope" else 32
    sizes = {"kv_lora_rank": half, "qk_rope_head_dim": half}
    report, factors = convert_and_keep(source, tmp_path / "out", calibration_text, **sizes, **bound)
    ids = some_ids(1, tokens=64)
    converted = load(tmp_path / "out")
    expected = factor_logits(source, factors, plain_grid(read_config(tmp_path / "out")), ids[0])
    assert difference(logits(converted, ids)[0], expected) < 1e-4
    smaller = convert(asked(source, tmp_path / "small", calibration_text, kv_ratio=0.25, **bound))
    assert report.mean_relative_error < 0.6 * smaller.mean_relative_error


def test_without_the_factor_on_the_logits_it_would_be_another_model(tmp_path):
    source = tiny_checkpoint(tmp_path / "source", **SCALED["yarn"])
    convert(asked(source, tmp_path / "out", exact=True))
    model, ids = load(source), some_ids()
    wanted = logits(model, ids)
    model.model.rotary_emb.attention_scaling = 1.0
    assert difference(logits(model, ids), wanted) > 0.1
    assert torch.allclose(logits(load(tmp_path / "out"), ids), wanted, atol=1e-3)


@pytest.mark.parametrize("name", ["linear", "llama3"])
def test_for_engines_that_scale_frequencies_the_slots_have_the_sources(calibration_text, tmp_path, name):
    """A single head of full size: nothing is lost on its own grid, where the plain one cannot say all of it."""
    source = tiny_checkpoint(tmp_path / "source", num_key_value_heads=1, **SCALED[name])
    ids, sizes = some_ids(), {"kv_lora_rank": 16, "qk_rope_head_dim": 16}
    wanted, found = logits(load(source), ids), {}
    for engines in (("transformers",), ("transformers", "llama.cpp")):
        folder = tmp_path / engines[-1]
        report = convert(asked(source, folder, calibration_text, engine=engines, **sizes))
        scaling = read_config(folder)["rope_scaling"]
        if engines == ("transformers",):
            assert scaling | {"rope_theta": 10000.0} == {**SCALED[name]["rope_parameters"], "type": name}
            assert report.plan.engines == ("transformers", "mlx")
        else:
            assert scaling["type"] == "yarn"
            assert "llama.cpp" in report.plan.engines
        found[engines[-1]] = difference(logits(load(folder), ids), wanted)
    assert found["transformers"] < 1e-3
    assert found["llama.cpp"] > 10 * found["transformers"]
