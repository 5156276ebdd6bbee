"""``transmla verify`` finds every damage, says which file, and finds nothing in what is whole."""

from __future__ import annotations

import hashlib
import json
import re
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import DynamicCache

from tests.factory import tiny_checkpoint
from transmla.modeling import absorbed_attention as attention
from transmla.verify.logits import compare_logits

CHECKS = ["config", "files", "shapes", "values", "checksums", "tokenizer", "decoding"]


@pytest.fixture(scope="module")
def sharded(cli, tmp_path_factory):
    """A source and its exact conversion, in several files each."""
    root = tmp_path_factory.mktemp("verify")
    source = tiny_checkpoint(root / "source", shards=2)
    assert cli("convert", source, root / "mla", "--exact", "--max-shard-size", "100kB", "-q").exit_code == 0
    return source, root / "mla"


@pytest.fixture
def copy(sharded, tmp_path):
    return shutil.copytree(sharded[1], tmp_path / "mla")


@pytest.fixture
def verified(cli):
    """Run the command, and return what was found by check, and the exit code."""

    def verified(*arguments):
        result = cli("verify", *arguments, "--json", "-q")
        assert result.stderr == ""
        report = json.loads(result.stdout)
        assert report["passed"] is (result.exit_code == 0)
        return {check["name"]: (check["outcome"], check["found"]) for check in report["checks"]}, report

    return verified


def test_a_conversion_is_whole_and_says_what_its_source_says(verified, sharded):
    source, mla = sharded
    checks, report = verified(mla, "--source", source)
    assert list(checks) == [*CHECKS, "logits"]
    assert {outcome for outcome, _ in checks.values()} == {"passed"}
    assert report["checksums"] == {
        path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in mla.glob("*.safetensors")
    }
    assert len(report["checksums"]) > 2
    assert report["logits"]["largest_difference"] < 1e-4
    assert report["logits"]["top1"] == 1


def test_a_source_can_be_verified_too(verified, sharded):
    checks, _ = verified(sharded[0])
    assert checks.pop("checksums") == ("skipped", "no report says what they should be")
    assert {outcome for outcome, _ in checks.values()} == {"passed"}


@pytest.mark.parametrize("family", ["phi3", "mixtral", "qwen3_moe"])
def test_fused_and_packed_weights_are_expected_as_they_are_stored(verified, tmp_path, family):
    checks, _ = verified(tiny_checkpoint(tmp_path / "source", family=family))
    assert checks["shapes"][0] == "passed", checks


def test_a_mixture_that_was_converted(verified, cli, tmp_path, calibration_text):
    source = tiny_checkpoint(tmp_path / "source", family="mixtral")
    flags = ["--exact", "--calibration", calibration_text, "--num-windows", 4, "--window", 32, "-q"]
    assert cli("convert", source, tmp_path / "mla", *flags).exit_code == 0
    checks, _ = verified(tmp_path / "mla")
    assert {outcome for outcome, _ in checks.values()} == {"passed"}


@pytest.fixture(scope="module")
def mixture(cli, tmp_path_factory):
    """A mixture whose tokens have little in common, converted exactly on text of one kind."""
    root = tmp_path_factory.mktemp("mixture")
    source = tiny_checkpoint(root / "source", family="mixtral")
    (root / "digits.txt").write_text("1 2 3 4 5 6 7 8 9 0 " * 400)
    flags = ["--exact", "--calibration", root / "digits.txt", "--num-windows", 8, "--window", 32]
    result = cli("convert", source, root / "mla", *flags)
    assert result.exit_code == 0, result.stderr
    return source, root / "mla", result.stderr


def test_routing_that_was_fitted_on_other_text_is_no_damage(verified, mixture):
    source, mla, _ = mixture
    checks, report = verified(mla, "--source", source)
    routing = report["logits"]["routing"]
    # Tokens are sent to other experts, and nothing else is wrong.
    assert report["logits"]["largest_difference"] > 0.01
    assert routing["exchanged_experts"] > 1e-4
    assert routing["largest_difference"] < 1e-3
    assert routing["largest_router_difference"] < 1e-3
    assert checks["logits"][0] == "passed"
    assert "of the experts are others" in checks["logits"][1]


@pytest.mark.parametrize("name", ["model.layers.1.mlp.gate.weight", "model.layers.0.self_attn.o_proj.weight"])
def test_damage_is_no_matter_of_routing(verified, mixture, tmp_path, name):
    source, mla, _ = mixture
    copy = shutil.copytree(mla, tmp_path / "mla")
    (copy / "transmla_report.json").write_text(
        json.dumps({**json.loads((copy / "transmla_report.json").read_text()), "checksums": None})
    )
    tensors = load_file(copy / "model.safetensors")
    tensors[name][0] *= 1.5
    save_file(tensors, copy / "model.safetensors", metadata={"format": "pt"})
    checks, _ = verified(copy, "--source", source)
    assert checks["logits"][0] == "failed", checks["logits"][1]


def test_a_mixture_that_is_fitted_on_one_text_is_told(mixture):
    assert "routing is fitted on one text" in " ".join(mixture[2].split())
    assert "--calibration" in mixture[2]


def shards(folder):
    return sorted(folder.glob("*.safetensors"))


def change_a_byte(copy):
    data = bytearray(shards(copy)[1].read_bytes())
    data[-3] ^= 1
    shards(copy)[1].write_bytes(data)


def truncate(copy):
    shards(copy)[1].write_bytes(shards(copy)[1].read_bytes()[:-8])


def remove_a_shard(copy):
    shards(copy)[1].unlink()


def spoil(copy):
    tensors = load_file(shards(copy)[0])
    name = next(name for name, tensor in tensors.items() if tensor.ndim == 2)
    tensors[name][1, 2] = torch.nan
    save_file(tensors, shards(copy)[0], metadata={"format": "pt"})


def enlarge_the_config(copy):
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps({**config, "kv_lora_rank": config["kv_lora_rank"] + 1}))


def deepen_the_config(copy):
    """A skeleton of it would never be finished."""
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 10**6}))


def leave_a_shard(copy):
    shutil.copyfile(shards(copy)[0], copy / "model-00099-of-00099.safetensors")


def point_outside(copy):
    index = json.loads((copy / "model.safetensors.index.json").read_text())
    name = next(iter(index["weight_map"]))
    index["weight_map"][name] = "../" + index["weight_map"][name]
    (copy / "model.safetensors.index.json").write_text(json.dumps(index))


@pytest.mark.parametrize(
    ("damage", "check", "sentence"),
    [
        (change_a_byte, "checksums", "model-00002-of-.*is not the file that was written"),
        (truncate, "files", "model-00002-of-.*is truncated"),
        (remove_a_shard, "files", "has no file model-00002-of-"),
        (spoil, "values", "NaN or infinite"),
        (enlarge_the_config, "shapes", "config.json needs the shape"),
        (deepen_the_config, "shapes", "num_hidden_layers 1000000, but the weights are of 2 layers"),
        (leave_a_shard, "files", "model-00099-of-00099.safetensors belongs to no index"),
        (point_outside, "files", "only plain names inside the folder"),
    ],
)
def test_damage_is_found(verified, sharded, copy, damage, check, sentence):
    damage(copy)
    checks, _ = verified(copy, "--source", sharded[0])
    assert checks[check][0] == "failed"
    assert re.search(sentence, checks[check][1])
    assert checks["logits"] == ("skipped", "needs a checkpoint that is whole")


def test_the_weights_of_another_model_are_found_beside_the_source(verified, cli, sharded, tmp_path):
    other = tiny_checkpoint(tmp_path / "other", seed=7)
    assert cli("convert", other, tmp_path / "mla", "--exact", "-q").exit_code == 0
    checks, _ = verified(tmp_path / "mla", "--source", sharded[0])
    outcome, found = checks["logits"]
    assert outcome == "failed"
    assert "standard deviations" in found


@pytest.mark.parametrize("family", ["deepseek", "llama"])
def test_a_cache_that_is_not_read_is_found(verified, sharded, monkeypatch, family):
    """As when a release of transformers hands it over by a name that is not known."""
    if family == "deepseek":
        monkeypatch.setattr(attention, "_take_cache", lambda kwargs: kwargs.clear())
        checks, report = verified(sharded[1])
        assert report["decoding"]["cached"] < 1e-4
        broken = report["decoding"]["absorbed"]
    else:
        update = DynamicCache.update
        monkeypatch.setattr(DynamicCache, "update", lambda self, *args, **kw: (update(self, *args, **kw), args[:2])[1])
        checks, report = verified(sharded[0])
        assert report["decoding"]["absorbed"] is None
        broken = report["decoding"]["cached"]
    assert broken > 0.01
    assert checks["decoding"][0] == "failed"


def test_a_context_with_no_room_for_a_needle(verified, cli, sharded, tmp_path):
    flags = ["--exact", "--max-position-embeddings", 16, "-q"]
    assert cli("convert", sharded[0], tmp_path / "mla", *flags).exit_code == 0
    checks, report = verified(tmp_path / "mla", "--source", sharded[0])
    assert checks["logits"][0] == "passed", checks["logits"]
    assert report["logits"]["num_positions"] == 4 * 16


def test_a_config_of_another_profile_is_found(verified, sharded, copy):
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps({**config, "rms_norm_eps": 1e-2}))
    checks, _ = verified(copy, "--source", sharded[0])
    assert checks["config"][0] == "failed"
    assert "rms_norm_eps is 0.01, and the recipe says --profile portable" in checks["config"][1]


def test_logits_that_say_nothing_are_worth_nothing():
    torch.manual_seed(0)
    source = 3 * torch.randn(2, 5, 11)
    same = compare_logits(source, source + 1)
    # A constant added to all logits of a position changes no probability.
    assert same.kl == pytest.approx(0, abs=1e-6)
    assert same.top1 == 1
    nothing = compare_logits(source, torch.zeros_like(source))
    assert nothing.kl == pytest.approx(nothing.kl_of_uniform, rel=1e-5)


def test_the_table_is_for_people(cli, sharded, copy):
    change_a_byte(copy)
    result = cli("verify", copy, "-q")
    assert result.exit_code == 1
    assert max(map(len, result.stdout.splitlines())) <= 80
    assert "failed" in result.stdout
    assert cli("verify", sharded[1], "-q").exit_code == 0


def test_no_checkpoint_is_a_sentence(cli, tmp_path):
    result = cli("verify", tmp_path / "absent")
    assert result.exit_code == 1
    assert result.stderr.startswith("Error: There is no folder")
