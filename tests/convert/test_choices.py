"""One conversion for each choice a user has, on disk and in stock transformers."""

from __future__ import annotations

import json
from itertools import pairwise

import pytest
import torch
import yaml

from tests.convert.models import (
    asked,
    contents,
    convert_and_keep,
    difference,
    factor_logits,
    load,
    load_tensors,
    logits,
    plain_grid,
    read_config,
    some_ids,
    stored_logits,
)
from tests.factory import tiny_checkpoint
from transmla.config import ConvertRequest
from transmla.convert.run import convert
from transmla.errors import UsageError

ROPE_TYPES = {
    "default": {"rope_type": "default", "rope_theta": 500000.0},
    "linear": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 3.0},
    "llama3": {
        "rope_type": "llama3",
        "rope_theta": 10000.0,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    },
}

SIZES = {"kv_lora_rank": 24, "qk_rope_head_dim": 8}


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return tiny_checkpoint(tmp_path_factory.mktemp("source"), shards=2)


@pytest.fixture
def output(tmp_path):
    return tmp_path / "out"


@pytest.mark.parametrize("rope", ROPE_TYPES)
def test_exact_mode_repeats_every_frequency(rope, tmp_path, output):
    source = tiny_checkpoint(tmp_path / "source", rope_parameters=ROPE_TYPES[rope], num_key_value_heads=3)
    convert(asked(source, output, exact=True))
    before, after = load(source), load(output)
    frequencies = before.model.rotary_emb.inv_freq.repeat(3)
    # Equal bits for plain RoPE; a scaled frequency that is no float32's reciprocal is rounded once, measured 7e-8.
    tolerance = 0 if rope == "default" else 1.2e-7
    torch.testing.assert_close(after.model.rotary_emb.inv_freq, frequencies, rtol=tolerance, atol=0)
    ids = some_ids(tokens=500)
    assert difference(logits(after, ids), logits(before, ids)) < 1e-4  # measured 6e-6, llama3 2.4e-5


@pytest.mark.parametrize("rope", ["linear", "llama3"])
def test_scaled_rope_is_fitted_onto_a_plain_grid(rope, tmp_path, calibration_text):
    source = tiny_checkpoint(tmp_path / "source", rope_parameters=ROPE_TYPES[rope], num_key_value_heads=2)
    plain = tiny_checkpoint(
        tmp_path / "plain", rope_parameters={"rope_type": "default", "rope_theta": 10000.0}, num_key_value_heads=2
    )
    wanted, ids = logits(load(source), some_ids(tokens=64)), some_ids(tokens=64)
    errors = []
    # The same weights read as though nothing had been scaled are the floor: what a copied grid would give.
    for model in (source, plain):
        output = tmp_path / f"{model.name}-mla"
        convert(asked(model, output, calibration_text, kv_lora_rank=48, qk_rope_head_dim=16))
        converted = load(output)
        torch.testing.assert_close(
            converted.model.rotary_emb.inv_freq.double(), plain_grid(read_config(output)), rtol=1e-6, atol=0
        )
        errors.append((logits(converted, ids) - wanted).square().mean())
    assert errors[0] < 0.7 * errors[1]  # measured 0.35 and 0.53


@pytest.mark.parametrize(
    "choices",
    [
        {"method": "rorope"},
        {"method": "rorope", "freq_fold": 2},
        {"freq_fold": 8},
        {"q_lora_rank": 20},
        {"kv_ratio": 0.2},
        {"kv_ratio": None, "kv_lora_rank": 33, "qk_rope_head_dim": 12},
        {"compute_dtype": "bfloat16"},
    ],
    ids=lambda choices: "-".join(choices),
)
def test_reloaded_it_is_the_function_that_was_computed(choices, source, output, calibration_text):
    choices = {"kv_ratio": 0.5, **choices}
    report, factors = convert_and_keep(source, output, calibration_text, **choices)
    config, ids = read_config(output), some_ids(1)[0]
    assert config["q_lora_rank"] == report.plan.q_lora_rank == choices.get("q_lora_rank")
    found = logits(load(output), ids[None])[0]
    assert difference(found, factor_logits(source, factors, plain_grid(config), ids)) < 1e-4  # measured 4e-6 to 1.3e-5
    # The reference that reads the stored tensors, used below for what stock transformers cannot run.
    assert difference(found, stored_logits(output, ids)) < 1e-4  # measured 3e-6 to 1.3e-5
    for layer in report.layers:
        assert 0 < layer.relative_error < 1
        assert layer.freq_fold == choices.get("freq_fold", layer.freq_fold)


@pytest.mark.parametrize("method", ["complex", "rorope"])
def test_from_the_weights_alone(method, source, output):
    report, factors = convert_and_keep(source, output, calibration="none", kv_ratio=0.5, method=method)
    ids = some_ids(1)[0]
    expected = factor_logits(source, factors, plain_grid(read_config(output)), ids)
    assert difference(logits(load(output), ids[None])[0], expected) < 1e-4  # measured 5e-6
    assert report.calibration is None
    assert report.mean_relative_error is None
    assert [layer.relative_error for layer in report.layers] == [None, None]
    assert "Converted from the weights alone, without calibration text." in (output / "README.md").read_text()


def test_calibration_is_worth_it(source, tmp_path, calibration_text):
    """Same sizes, on held-out windows: less error with text than without, with more numbers than with fewer."""
    errors = {}
    for ratio in (0.25, 0.5, 0.75):
        report = convert(asked(source, tmp_path / f"{ratio}", calibration_text, kv_ratio=ratio))
        errors[ratio] = [layer.relative_error for layer in report.layers]
    for smaller, larger in pairwise(errors.values()):
        assert all(a > b for a, b in zip(smaller, larger, strict=True))


def test_quantizable_profile(source, output, calibration_text):
    report, factors = convert_and_keep(source, output, calibration_text, kv_ratio=0.5, profile="quantizable")
    config, ids = read_config(output), some_ids(1)[0]
    assert config["rms_norm_eps"] == 1.0
    assert set(report.plan.engines) == {"llama.cpp"}
    expected = factor_logits(source, factors, plain_grid(config), ids)
    assert difference(stored_logits(output, ids), expected) < 1e-2  # the norm is off by 1e-4; measured 1e-3
    # Stock transformers takes 1e-6 in the latent norm whatever the config says, so it is no engine for this profile.
    assert difference(logits(load(output), ids[None])[0], expected) > 0.1


def test_what_transformers_cannot_compute_is_not_evaluated(cli, source, output, calibration_text):
    convert(asked(source, output, calibration_text, kv_ratio=0.5, profile="quantizable"))
    result = cli("eval", source, output, "--dataset", calibration_text, "--window", 32, "-q")
    assert result.exit_code == 1
    assert "was converted with --profile quantizable, which transformers cannot compute" in result.stderr
    assert result.stdout == ""


def test_repeats_need_a_text(source, output):
    with pytest.raises(UsageError, match="--repeats adds windows to those of a text: pass --calibration FILE, or drop"):
        convert(asked(source, output, "none", kv_ratio=0.5, repeats=0.5))


def test_float16_needs_the_quantizable_profile(source, output, calibration_text):
    convert(asked(source, output, calibration_text, kv_ratio=0.5, profile="quantizable", dtype="float16"))
    tensors = load_tensors(output, dtype=None)
    assert {tensor.dtype for tensor in tensors.values()} == {torch.float16}
    assert all(tensor.isfinite().all() and tensor.any() for tensor in tensors.values())


@pytest.mark.parametrize(("engine", "nope", "value"), [("vllm", 64, 128), ("sglang", 128, 128)])
def test_padding_for_an_engine_changes_nothing(engine, nope, value, tmp_path, calibration_text):
    source = tiny_checkpoint(tmp_path / "source", head_dim=32, num_attention_heads=6, num_key_value_heads=3)
    sizes = {"kv_lora_rank": 512, "qk_rope_head_dim": 64}
    report, plain = convert_and_keep(source, tmp_path / "padded", calibration_text, **sizes, engine=engine)
    assert engine in report.plan.engines
    assert (plain[0].query_nope.shape[1], plain[0].value_up.shape[1]) == (32, 32)
    padded = read_config(tmp_path / "padded")
    assert (padded["qk_nope_head_dim"], padded["v_head_dim"]) == (nope, value)
    ids = some_ids(1)[0]
    expected = factor_logits(source, plain, plain_grid(padded), ids)
    assert difference(logits(load(tmp_path / "padded"), ids[None])[0], expected) < 1e-4  # measured 8e-6


def test_shards_hold_what_one_file_holds(source, output, calibration_text, tmp_path):
    convert(asked(source, output, calibration_text, kv_ratio=0.5))
    convert(asked(source, tmp_path / "sharded", calibration_text, kv_ratio=0.5, max_shard_size="90kB"))
    index = json.loads((tmp_path / "sharded" / "model.safetensors.index.json").read_text())
    assert set(index["weight_map"].values()) == {path.name for path in (tmp_path / "sharded").glob("*.safetensors")}
    assert len(set(index["weight_map"].values())) > 2
    one, many = load_tensors(output), load_tensors(tmp_path / "sharded")
    assert one.keys() == many.keys() == index["weight_map"].keys()
    assert all(torch.equal(one[name], many[name]) for name in one)
    load(tmp_path / "sharded")


def test_the_same_request_gives_the_same_bytes(source, tmp_path, calibration_text):
    folders = {name: tmp_path / name / "out" for name in ("first", "second", "recipe", "other seed")}
    convert(asked(source, folders["first"], calibration_text, **SIZES))
    convert(asked(source, folders["second"], calibration_text, **SIZES))
    # The recipe in the output runs as it is.
    recipe = folders["first"] / "transmla_recipe.yaml"
    convert(ConvertRequest.build(recipe=recipe, flags={"output_dir": folders["recipe"]}))
    convert(asked(source, folders["other seed"], calibration_text, **SIZES, seed=1))
    assert contents(folders["second"]) == contents(folders["first"])
    assert contents(folders["recipe"]) == contents(folders["first"])
    assert contents(folders["other seed"])["model.safetensors"] != contents(folders["first"])["model.safetensors"]
    assert contents(folders["other seed"])["config.json"] == contents(folders["first"])["config.json"]


@pytest.mark.parametrize("sizes", [SIZES, {"kv_ratio": 0.5}], ids=["sizes", "ratio"])
def test_the_recipe_names_every_choice(sizes, source, output, calibration_text):
    request = asked(source, output, calibration_text, **sizes)
    plan = convert(request).plan
    recipe = yaml.safe_load((output / "transmla_recipe.yaml").read_text())
    # A ratio is written as the sizes it led to, so that the recipe need not search again.
    found = {"kv_ratio": None, "kv_lora_rank": plan.kv_lora_rank, "qk_rope_head_dim": plan.qk_rope_head_dim}
    # What is 0.33 by default today is so wherever the recipe is read.
    found |= {"repeats": 0.33}
    assert recipe == request.model_dump(mode="json") | found
    assert recipe.keys() == ConvertRequest.model_fields.keys() - {"token"}


def test_code_stays_behind(tmp_path, output):
    source = tiny_checkpoint(tmp_path / "source")
    (source / "modeling_custom.py").write_text("raise SystemExit\n")
    for name in ("config.json", "tokenizer_config.json", "generation_config.json"):
        content = json.loads((source / name).read_text())
        content["auto_map"] = {"AutoConfig": "modeling_custom.Config"}
        (source / name).write_text(json.dumps(content))
    convert(asked(source, output, exact=True))
    assert not list(output.glob("*.py"))
    assert not any("auto_map" in path.read_text() for path in output.glob("*.json"))


def test_overwrite_replaces_a_model(source, output, calibration_text):
    convert(asked(source, output, exact=True))
    (output / "notes.txt").write_text("of the old one")
    convert(asked(source, output, calibration_text, **SIZES), overwrite=True)
    assert read_config(output)["kv_lora_rank"] == 24
    assert not (output / "notes.txt").exists()
    assert [path.name for path in output.parent.iterdir()] == ["out"]


def test_the_card_says_what_it_is(source, output, calibration_text):
    report = convert(asked(source, output, calibration_text, **SIZES))
    card = (output / "README.md").read_text(encoding="utf-8")
    front, _, text = card.removeprefix("---\n").partition("---\n")
    assert yaml.safe_load(front)["tags"] == ["transmla", "mla", "deepseek_v3"]
    assert text.startswith("\n# out\n")
    assert "| KV cache, numbers per token and layer | 64 | 32 (24 latent + 8 rotary) |" in text
    assert "| KV cache, bytes per token (float32) | 512 | 256 (50%) |" in text
    assert f"mean of the layers: {report.mean_relative_error:.3f}" in text
    # A folder of the machine that converted means nothing to others.
    assert str(source) not in card
