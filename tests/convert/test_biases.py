"""Biases on queries, keys and values: kept where engines have a place for them, folded into the weights elsewhere."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import save_file

from tests.convert.examples import randn
from tests.convert.models import asked, difference, load, load_tensors, logits, read_config, some_ids
from tests.factory import tiny_checkpoint
from transmla.calibration.constant import near_constant_of
from transmla.convert.plan import plan_conversion
from transmla.convert.run import convert
from transmla.errors import UsageError

SIZES = {"kv_lora_rank": 44, "qk_rope_head_dim": 16}


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """Give every token something in common, as training does: random models have no near-constant functional."""
    folder = tiny_checkpoint(tmp_path_factory.mktemp("source"), family="qwen2")
    tensors = load_tensors(folder, dtype=None)
    tensors["model.embed_tokens.weight"][:, :6] += 2
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.fixture(scope="module")
def without_biases(source, tmp_path_factory):
    """The same model with its biases at zero."""
    folder = tiny_checkpoint(tmp_path_factory.mktemp("silent"), family="qwen2")
    tensors = load_tensors(source, dtype=None)
    silent = {name: torch.zeros_like(t) if name.endswith("bias") else t for name, t in tensors.items()}
    save_file(silent, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


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


def test_the_functional_is_nearly_one_where_tokens_have_something_in_common():
    inputs = randn(5, 20, 8, seed=0)
    inputs[..., 2] = 3 + 0.01 * randn(5, 20, seed=1)
    constant = near_constant_of(inputs, batch_size=2)
    assert ((inputs @ constant) - 1).abs().max() < 0.02
    by_lstsq = torch.linalg.lstsq(inputs.flatten(0, 1), torch.ones(100, 1).double()).solution[:, 0]
    assert difference(constant, by_lstsq) < 1e-4


@pytest.mark.parametrize(
    ("choices", "message"),
    [
        ({"biases": "fold", "exact": True}, "--exact fits nothing: drop --biases"),
        ({"biases": "fold", "calibration": "none", **SIZES}, "--biases fold needs a text"),
        ({"engine": "llama.cpp", "exact": True}, "every rotary slot its own frequency"),
        ({"engine": "llama.cpp", "calibration": "none", **SIZES}, "no place for the biases of k_proj, q_proj, v_proj"),
    ],
)
def test_what_cannot_be_is_said_before_anything_is_read(source, tmp_path, choices, message):
    with pytest.raises(UsageError, match=message):
        plan_conversion(asked(source, tmp_path / "out", **choices))


def test_a_bias_on_the_output_stays(calibration_text, tmp_path):
    source = tiny_checkpoint(tmp_path / "source", attention_bias=True)
    with pytest.raises(UsageError, match="bias on the output of attention: use --biases keep"):
        plan_conversion(asked(source, tmp_path / "out", calibration_text, biases="fold", **SIZES))
