"""Switching a latent norm on where it did nothing."""

from __future__ import annotations

import json

import pytest
import torch
from transformers import AutoModelForCausalLM

from tests.convert.models import checkpoint_with_a_common_direction
from tests.factory import tiny_checkpoint
from tests.finetune.conftest import FEW, SIZES, loads, weights

FITTED_NORM = "--latent-norm fitted"


@pytest.fixture(scope="module")
def common(cli, tmp_path_factory, calibration_text):
    """A model like trained ones: some direction of the layers' inputs is the same for all tokens."""
    root = tmp_path_factory.mktemp("norm")
    source = checkpoint_with_a_common_direction(root / "source")
    flags = (*SIZES, *FEW, "--calibration", calibration_text, "-q")
    assert cli("convert", source, root / "mla", *flags).exit_code == 0
    return root / "mla"


def report_of(folder):
    return json.loads((folder / "transmla_finetune.json").read_text())


def eight_bits(weight):
    """Round in blocks of 32, as q8_0 does."""
    blocks = weight.unflatten(1, (-1, 16))
    scale = (blocks.abs().amax(-1, keepdim=True) / 127).half().float()
    return torch.where(scale > 0, (blocks / scale).round() * scale, 0.0).flatten(1)


def test_a_fitted_norm_costs_little_and_is_trained(train, common, tmp_path):
    neutral = report_of(train(common, tmp_path / "neutral", "--max-steps 1"))["heldout"]
    output = train(common, tmp_path / "norm", f"--max-steps 24 --eval-steps 8 --learning-rate 5e-5 {FITTED_NORM}")
    fitted = report_of(output)["heldout"]
    # One number of 24 has gone. Found: 0.002 nats.
    assert neutral[0]["kl"] < fitted[0]["kl"] < neutral[0]["kl"] + 0.01
    assert fitted[-1]["loss"] < fitted[0]["loss"]
    norm = weights(output)["model.layers.1.self_attn.kv_a_layernorm.weight"]
    assert len(norm.unique()) == 24
    assert loads(output)


def test_engines_compute_what_was_trained(train, cli, common, tmp_path, calibration_text):
    output = train(common, tmp_path / "out", f"--max-steps 0 {FITTED_NORM}")
    source = json.loads((common / "transmla_report.json").read_text())["plan"]["model"]
    result = cli("eval", source, output, "--dataset", calibration_text, "--window", 32, "--max-tokens", 512, "--json")
    before = report_of(train(common, tmp_path / "one", f"--max-steps 1 {FITTED_NORM}"))["heldout"][0]
    measured = json.loads(result.stdout)["texts"][0]["scores"][1]
    assert measured["nll"] == pytest.approx(before["nll"], rel=1e-5)


def test_it_survives_blocks_of_eight_bits(train, common, tmp_path):
    fitted = train(common, tmp_path / "norm", f"--max-steps 0 {FITTED_NORM}")
    tokens = torch.arange(5, 65).view(2, 30)
    off = {}
    for name, folder in (("norm", fitted), ("neutral", common)):
        model = AutoModelForCausalLM.from_pretrained(folder)
        with torch.no_grad():
            before = model(tokens).logits
            for layer in model.model.layers:
                linear = layer.self_attn.kv_a_proj_with_mqa
                linear.weight.copy_(eight_bits(linear.weight))
            off[name] = ((model(tokens).logits - before).std() / before.std()).item()
    # Found: 0.01 and 0.5.
    assert off["norm"] < 0.05
    assert off["neutral"] > 5 * off["norm"]


@pytest.mark.parametrize("train_what", ["all", "lora"])
def test_with_every_way_to_train(train, common, tmp_path, train_what):
    output = train(common, tmp_path / "out", f"--max-steps 2 --train {train_what} {FITTED_NORM}")
    assert loads(output)
    assert len(weights(output)["model.layers.0.self_attn.kv_a_layernorm.weight"].unique()) == 24


def test_with_biases(train, cli, tmp_path, calibration_text):
    source = tiny_checkpoint(tmp_path / "source", family="qwen2")
    flags = (*SIZES, *FEW, "--calibration", calibration_text, "-q")
    assert cli("convert", source, tmp_path / "mla", *flags).exit_code == 0
    neutral = report_of(train(tmp_path / "mla", tmp_path / "neutral", "--max-steps 1"))["heldout"][0]
    fitted = report_of(train(tmp_path / "mla", tmp_path / "norm", f"--max-steps 1 {FITTED_NORM}"))
    # Found: 0.02 nats.
    assert fitted["heldout"][0]["kl"] < neutral["kl"] + 0.1
    assert loads(tmp_path / "norm")


def test_the_quantizable_profile_has_no_need(cli, common, tmp_path, calibration_text):
    source = json.loads((common / "transmla_report.json").read_text())["plan"]["model"]
    flags = (*SIZES, *FEW, "--profile", "quantizable", "--calibration", calibration_text, "-q")
    assert cli("convert", source, tmp_path / "mla", *flags).exit_code == 0
    result = cli(
        "finetune", tmp_path / "mla", tmp_path / "out", "--dataset", calibration_text, *FITTED_NORM.split(), "-q"
    )
    assert result.exit_code == 2
    assert "--latent-norm fitted is for the portable profile" in result.stderr
