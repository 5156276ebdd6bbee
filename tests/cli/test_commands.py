"""What the commands print, and where: the result on stdout, the rest on stderr."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.factory import tiny_checkpoint
from transmla.config import ConvertRequest
from transmla.convert.inspection import Inspection
from transmla.convert.report import ConversionReport
from transmla.convert.summary import PlanSummary

RECIPES = Path(__file__).parents[2] / "configs" / "convert"
FEW = ("--num-windows", "4", "--num-heldout-windows", "2", "--window", "32")


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return tiny_checkpoint(tmp_path_factory.mktemp("source"))


@pytest.fixture
def output(tmp_path):
    return tmp_path / "out"


def test_inspect_prints_json_that_reads_back(cli, source):
    result = cli("inspect", source, "--json", "--context", "1000")
    assert (result.exit_code, result.stderr) == (0, "")
    inspection = Inspection.model_validate_json(result.stdout)
    assert (inspection.num_attention_heads, inspection.num_key_value_heads, inspection.head_dim) == (6, 2, 16)
    assert inspection.kv_numbers_per_token_layer == 64
    assert inspection.kv_bytes_per_token == 64 * 2 * 4
    assert inspection.kv_bytes_in_context == 1000 * 64 * 2 * 4
    assert [way.share for way in inspection.candidates if not way.exact] == [0.5, 22 / 64, 0.25, 0.125]


def test_inspect_prints_a_table_of_80_columns(cli, source):
    result = cli("inspect", source)
    assert (result.exit_code, result.stderr) == (0, "")
    assert max(map(len, result.stdout.splitlines())) <= 80
    for part in ("Llama (llama), 86,352 parameters, float32", "6 query, 2 key/value, size 16", "--kv-ratio 0.5"):
        assert part in result.stdout


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3", "mixtral"])
def test_every_way_that_inspect_names_can_be_converted(cli, tmp_path, family, calibration_text):
    """Wide enough a model for the sizes of every engine."""
    sizes = {"num_attention_heads": 8, "num_key_value_heads": 8, "head_dim": 64, "num_hidden_layers": 1}
    source = tiny_checkpoint(tmp_path / "source", family=family, **sizes)
    inspection = json.loads(cli("inspect", source, "--json").stdout)
    assert {engine for way in inspection["candidates"] for engine in way["engines"]} == {
        "transformers", "vllm", "vllm-cpu", "sglang", "llama.cpp", "mlx",
    }  # fmt: skip
    assert any(way["exact"] for way in inspection["candidates"]) is (family != "qwen3")
    text = {"FILE": str(calibration_text)}

    def plan(way):
        flags = [text.get(word, word) for word in " ".join(way["flags"]).split()]
        flags += ["--window", "64", "--num-windows", "4"] if "--calibration" in flags else []
        # The published method predicts no errors, which would take longer than all else here.
        flags += [] if "--exact" in flags else ["--method", "rorope"]
        result = cli("convert", source, tmp_path / "out", *flags, "--dry-run", "--json")
        assert result.exit_code == 0, result.stderr
        return json.loads(result.stdout)

    for way in inspection["candidates"]:
        planned = plan(way)
        assert planned["kv_bytes_per_token"] == way["kv_bytes_per_token"]
        assert planned["engines"] == way["engines"]
    for verdict in inspection["engines"]:
        assert verdict["loads"] in ("exact", "approximate")
        assert verdict["engine"] in plan(verdict)["engines"]
        assert bool(verdict["why"]) is (verdict["loads"] == "approximate" or family == "mixtral")


@pytest.mark.parametrize(
    ("family", "config", "expected"),
    [
        ("llama", {}, {"transformers": "exact", "llama.cpp": "approximate", "mlx": "approximate", "vllm": "no"}),
        ("qwen3", {}, {"transformers": "approximate", "sglang": "no"}),
        ("llama", {"attention_bias": True}, {"transformers": "exact", "mlx": "approximate", "llama.cpp": "no"}),
        ("llama", {"num_hidden_layers": 62}, {"mlx": "no", "llama.cpp": "approximate"}),
    ],
)
def test_inspect_says_what_every_engine_makes_of_a_model(cli, tmp_path, monkeypatch, family, config, expected):
    # A path is a word of the commands and can't be broken, so the width of 80 holds for short ones.
    monkeypatch.chdir(tmp_path)
    source = tiny_checkpoint(Path("source"), family=family, **config)
    verdicts = {
        verdict["engine"]: verdict for verdict in json.loads(cli("inspect", source, "--json").stdout)["engines"]
    }
    assert {engine: verdicts[engine]["loads"] for engine in expected} == expected
    for verdict in verdicts.values():
        assert (verdict["flags"] == []) is (verdict["loads"] == "no")
        assert (verdict["why"] == "") is (verdict["loads"] == "exact")
    shown = cli("inspect", source).stdout
    assert max(map(len, shown.splitlines())) <= 80
    for engine, loads in expected.items():
        assert re.search(rf"^ {re.escape(engine)} +{loads} ", shown, re.MULTILINE)


def test_keys_that_transformers_does_not_read_are_named(cli, tmp_path, output):
    keys = {"dual_chunk_attention_config": {"chunk_size": 9}, "logit_scale": 0.5}
    source = tiny_checkpoint(tmp_path / "source", family="qwen2", **keys)
    for command in (["inspect", source], ["convert", source, output, "--exact", "--dry-run"]):
        shown = " ".join(cli(*command).stdout.split())
        assert "Unread of config.json: dual_chunk_attention_config (vLLM's attention in long contexts)," in shown
        assert "logit_scale; transformers does not read" in shown
        assert json.loads(cli(*command, "--json").stdout)["unread"] == sorted(keys)


@pytest.mark.parametrize("as_json", [False, True])
def test_a_dry_run_writes_nothing_and_reads_no_weights(cli, source, output, as_json, monkeypatch):
    monkeypatch.setattr("transmla.checkpoint.reader.CheckpointReader.read", None)
    before = {path: path.stat().st_mtime_ns for path in source.iterdir()}
    flags = ["--kv-ratio", "0.5", "--calibration", "none", "--dry-run", *["--json"] * as_json]
    result = cli("convert", source, output, *flags)
    assert (result.exit_code, result.stderr) == (0, "")
    if as_json:
        plan = PlanSummary.model_validate_json(result.stdout)
        assert (plan.kv_lora_rank, plan.qk_rope_head_dim, plan.num_shards) == (24, 8, 1)
        assert (plan.source_kv_bytes_per_token, plan.kv_bytes_per_token) == (512, 256)
    else:
        assert "64 → 32 numbers per token and layer (24 latent + 8 rotary)" in result.stdout
    assert not list(output.parent.iterdir())
    assert {path: path.stat().st_mtime_ns for path in source.iterdir()} == before


def test_a_dry_run_with_text_predicts_what_the_sizes_cost(cli, source, output, calibration_text):
    flags = ["--kv-ratio", "0.5", "--calibration", calibration_text, *FEW, "--dry-run", "-q"]
    plan = PlanSummary.model_validate_json(cli("convert", source, output, *flags, "--json").stdout)
    best = plan.predictions[0]
    assert (plan.kv_lora_rank, plan.qk_rope_head_dim) == (best.kv_lora_rank, best.qk_rope_head_dim)
    table = " ".join(cli("convert", source, output, *flags).stdout.split())
    assert f"Predicted {best.kv_lora_rank} latent + {best.qk_rope_head_dim} rotary: error {best.error:.3g}" in table
    assert len(plan.predictions) == 4
    assert not list(output.parent.iterdir())


def test_the_plan_foretells_the_size_of_the_output(cli, source, output):
    plan = json.loads(cli("convert", source, output, "--exact", "--dry-run", "--json").stdout)
    assert cli("convert", source, output, "--exact", "-q").exit_code == 0
    assert plan["output_bytes"] == (output / "model.safetensors").stat().st_size


def test_converting_prints_the_report(cli, source, output, calibration_text):
    flags = ["--kv-ratio", "0.5", "--calibration", calibration_text, *FEW]
    result = cli("convert", source, output, *flags, "--json", "-q")
    assert (result.exit_code, result.stderr) == (0, "")
    report = ConversionReport.model_validate_json(result.stdout)
    assert report == ConversionReport.model_validate_json((output / "transmla_report.json").read_text())
    assert report.calibration.num_windows == 4

    result = cli("convert", source, output, *flags, "--overwrite")
    assert result.exit_code == 0
    assert "residual stream on held-out windows off by: mean 0." in result.stdout
    assert max(map(len, result.stdout.splitlines())) <= 80
    # The bar is no result.
    assert "Converting layers" in result.stderr
    assert "Converting layers" not in result.stdout


def test_flags_win_over_the_recipe_and_the_recipe_over_the_defaults(cli, source, output, tmp_path):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(f"model: {source}\nkv_ratio: 0.5\ncalibration: none\nmax_shard_size: 100kB\nengine: mlx\n")
    arguments = ("--config", recipe, "--dry-run", "--json")
    plan = json.loads(cli("convert", source, output, *arguments).stdout)
    assert (plan["numbers_per_token_layer"], plan["num_shards"] > 1, plan["method"]) == (32, True, "fitted")
    plan = json.loads(cli("convert", source, output, "--kv_ratio", "0.25", "--method", "rorope", *arguments).stdout)
    assert (plan["numbers_per_token_layer"], plan["num_shards"] > 1, plan["method"]) == (16, True, "rorope")


@pytest.mark.parametrize("recipe", sorted(RECIPES.glob("*.yaml")), ids=lambda path: path.name)
def test_recipes_of_the_repository_are_requests(recipe):
    ConvertRequest.build(recipe=recipe, flags={"model": "m", "output_dir": "o"})


@pytest.mark.parametrize("command", [[], ["inspect"], ["convert"], ["eval"]])
def test_help_does_not_wait_for_pytorch(command):
    code = (
        "import sys; from typer.testing import CliRunner; from transmla.cli.app import app;"
        f"result = CliRunner().invoke(app, {[*command, '--help']});"
        "assert result.exit_code == 0 and 'Usage' in result.stdout and not result.stderr, result.output;"
        "assert not {'torch', 'transformers', 'datasets'} & set(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_version(cli):
    import transmla

    assert cli("--version").stdout == f"{transmla.__version__}\n"
