"""What 0.1.0 wrote is of use: folders, recipes, reports, and a training that was interrupted.

``0.1.0.tar.xz`` was made by that release: a tiny source and a text, conversions by every method, one with a fitted
latent norm (then ``live``), a training, another one that was interrupted, reports and recipes.
"""

from __future__ import annotations

import json
import shutil
import tarfile
from pathlib import Path

import pytest
import yaml
from safetensors.torch import load_file

from transmla.bench.report import BenchReport
from transmla.config import ConvertRequest, EvalRequest, FinetuneRequest
from transmla.convert.report import ConversionReport
from transmla.evaluate.report.report import EvalReport
from transmla.finetune.report import FinetuneReport

CONVERTED = ("exact", "folded", "live", "neutral", "rorope")


@pytest.fixture(scope="module")
def unpacked(tmp_path_factory):
    folder = tmp_path_factory.mktemp("released")
    with tarfile.open(Path(__file__).with_name("0.1.0.tar.xz")) as archive:
        archive.extractall(folder, filter="data")
    return folder


@pytest.fixture
def folder(unpacked, tmp_path, monkeypatch):
    """A copy, in which the paths of recipes are right."""
    copy = tmp_path / "work"
    shutil.copytree(unpacked, copy)
    monkeypatch.chdir(copy)
    return copy


@pytest.mark.parametrize("name", [*CONVERTED, "tuned"])
def test_models_are_whole_and_generate(cli, folder, name):
    source = () if name in ("tuned", "folded") else ("--source", "source")
    verified = cli("verify", name, *source, "--device", "cpu", "-q", "--json")
    assert verified.exit_code == 0, verified.stdout
    if name == "exact":
        [logits] = [check for check in json.loads(verified.stdout)["checks"] if check["name"] == "logits"]
        assert logits["outcome"] == "passed"
    said = cli("generate", name, "A mill stood", "--max-new-tokens", "3", "--device", "cpu", "--json")
    assert said.exit_code == 0, said.stderr


@pytest.mark.parametrize("name", CONVERTED)
def test_recipes_convert_to_the_same_bytes(cli, folder, name):
    recipe = yaml.safe_load((folder / name / "transmla_recipe.yaml").read_text())
    request = ConvertRequest.model_validate(recipe)
    assert request.method in ("fitted", "rorope")
    assert request.latent_norm == ("fitted" if name == "live" else "neutral")
    assert request.biases == ("merge" if name == "folded" else "keep")
    # Recipes of 0.1.0 know nothing of repeats.
    flags = ("--repeats", "0", "--device", "cpu", "-q")
    again = cli("convert", request.model, "again", "--config", f"{name}/transmla_recipe.yaml", *flags)
    assert again.exit_code == 0, again.stderr
    old, new = (load_file(folder / made / "model.safetensors") for made in (name, "again"))
    assert old.keys() == new.keys()
    # Another release of a library may round otherwise: as it was stored, in bfloat16, hardly anything is seen of it.
    for tensor in old:
        difference = (old[tensor].float() - new[tensor].float()).norm() / old[tensor].float().norm().clamp_min(1e-30)
        assert difference < 0.02, tensor


@pytest.mark.parametrize("name", CONVERTED)
def test_reports_of_conversions_are_read(folder, name):
    report = ConversionReport.model_validate_json((folder / name / "transmla_report.json").read_text())
    assert report.format_version == 1
    assert report.plan.method == {"exact": "exact", "rorope": "rorope"}.get(name, "fitted")


def test_other_reports_are_read(folder):
    tuned = FinetuneReport.model_validate_json((folder / "tuned" / "transmla_finetune.json").read_text())
    assert FinetuneRequest.model_validate(tuned.request).latent_norm == "fitted"
    report = EvalReport.model_validate_json((folder / "eval.json").read_text())
    assert [text.data.num_windows > 0 for text in report.texts] == [True]
    assert len(report.contexts) == 3
    bench = BenchReport.model_validate_json((folder / "bench.json").read_text())
    assert {cell.form for cell in bench.cells} == {"expanded", "absorbed"}


def test_recipes_of_an_evaluation_are_read(cli, folder, monkeypatch):
    monkeypatch.setenv("TRANSMLA_CACHE", str(folder / "cache"))
    request = EvalRequest.build(recipe=folder / "recipe-eval.yaml", flags={"source": "source"})
    assert (request.needle_lengths, request.needle_depths, request.bench_contexts) == ((160,), 2, (64,))
    flags = ("--contexts", "160", "--num-depths", "2", "--num-trials", "1", "--device", "cpu", "-q", "--json")
    found = cli("eval", "source", "live", "tuned", *flags)
    assert found.exit_code == 0, found.stderr
    # Needles and copies are there; other kinds have come since.
    kinds = [cell["kind"] for cell in json.loads(found.stdout)["contexts"]]
    assert (kinds.count("needle"), kinds.count("copy")) == (2, 1)


def test_a_conversion_is_trained_and_an_interrupted_training_goes_on(cli, folder):
    flags = "--dataset text.txt --window 32 --num-eval-windows 4 --per-device-train-batch-size 2 --max-steps 6"
    more = "--eval-steps 2 --device cpu --latent-norm live --repeats 0 --hard-label-share 0 -q --json"
    whole = cli("finetune", "neutral", "whole", *flags.split(), *more.split())
    assert whole.exit_code == 0, whole.stderr
    resumed = cli("finetune", "neutral", "resumed", *flags.split(), *more.split(), "--resume")
    assert resumed.exit_code == 0, resumed.stderr
    first, second = (json.loads(result.stdout) for result in (whole, resumed))
    assert [point["step"] for point in second["heldout"]] == [point["step"] for point in first["heldout"]]
    assert second["heldout"][-1]["loss"] == pytest.approx(first["heldout"][-1]["loss"], rel=1e-4)
    other = cli("finetune", "neutral", "resumed2", *flags.split(), *more.split(), "--resume", "--seed", "1")
    assert other.exit_code == 0, other.stderr


def test_an_interrupted_conversion_is_begun_anew(cli, folder):
    arguments = ("convert", "source", "halfway", "--config", "recipe-convert.yaml", "--device", "cpu", "-q")
    result = cli(*arguments, "--resume")
    assert result.exit_code == 1
    assert "was begun by an earlier version of transmla: start anew without --resume" in result.stderr
    assert cli(*arguments).exit_code == 0


def test_a_report_of_a_later_format_is_refused(cli, folder):
    path = folder / "exact" / "transmla_report.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"format_version": 99}))
    result = cli("verify", "exact", "-q", "--json")
    assert result.exit_code == 1
    found = [check["found"] for check in json.loads(result.stdout)["checks"] if check["outcome"] == "failed"]
    sentence = "has format_version 99, and this transmla reads up to 2: upgrade transmla."
    assert found == [f"exact/transmla_report.json {sentence}"]
