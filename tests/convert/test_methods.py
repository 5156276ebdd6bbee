"""A method is a file: one that is registered here converts, predicts, resumes and reports like the shipped ones."""

from __future__ import annotations

import json

import pytest
import torch
from pydantic import Field

from tests.convert.models import read_config
from tests.factory import tiny_checkpoint
from transmla.convert import run as conversion
from transmla.convert.latent_attention import LatentAttention
from transmla.convert.methods import METHODS
from transmla.convert.methods.base import ConvertedLayer, Method, MethodOptions, PredictedCost
from transmla.convert.methods.fitted import Fitted, FittedOptions
from transmla.convert.methods.steps import in_float64
from transmla.linalg.rotary import interleave, to_pairs

SIZES = ("--kv-lora-rank", "12", "--qk-rope-head-dim", "8")
FEW = ("--num-windows", "8", "--num-heldout-windows", "2", "--window", "32")


class DummyOptions(MethodOptions):
    scale: float = Field(1.0, description="What is kept is multiplied by it.")


class Dummy(Method):
    """Keep the first numbers of the first head's keys and values, and have every head read those."""

    name = "dummy"
    title = "first numbers"
    options_type = DummyOptions
    predicts = True

    @property
    def learns_on_converted(self):
        return True

    def convert(self, weights, moments, goal):
        assert moments is not None
        weights = in_float64(weights)
        heads, slots = len(weights.query), 2 * len(goal.slot_frequencies)
        query = interleave(to_pairs(weights.query))
        latent = weights.joint[: goal.kv_lora_rank] * self.options.scale
        key_up = torch.zeros(heads, query.shape[1], goal.kv_lora_rank).to(latent)
        value_up = torch.eye(weights.value.shape[1], goal.kv_lora_rank).to(latent).expand(heads, -1, -1)
        attention = LatentAttention(
            query_nope=query,
            query_rope=query[:, :slots],
            latent=latent,
            key_rope=interleave(to_pairs(weights.key))[0, :slots],
            key_up=key_up,
            value_up=value_up,
            output=weights.output,
            output_bias=weights.output_bias,
            softmax_scale=query.shape[1] ** -0.5,
        )
        return ConvertedLayer(attention)

    def predict(self, weights, moments, goal):
        return PredictedCost(keys=0.0, values=float(goal.kv_lora_rank))


@pytest.fixture
def dummy(monkeypatch):
    monkeypatch.setitem(METHODS, "dummy", Dummy)


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return tiny_checkpoint(tmp_path_factory.mktemp("source"))


def convert(cli, source, output, text, *flags):
    return cli("convert", source, output, "--method", "dummy", "--calibration", text, *FEW, "-q", "--json", *flags)


def test_a_method_converts_reports_and_resumes(dummy, cli, source, calibration_text, tmp_path, monkeypatch):
    whole = convert(cli, source, tmp_path / "whole", calibration_text, *SIZES)
    assert whole.exit_code == 0, whole.stderr
    report = json.loads(whole.stdout)
    assert report["plan"]["method"] == "dummy"
    assert [layer["freq_fold"] for layer in report["layers"]] == [None, None]
    assert all(layer["relative_error"] < layer["error_before_refit"] for layer in report["layers"])
    assert "Method: `dummy`" in (tmp_path / "whole" / "README.md").read_text()
    assert read_config(tmp_path / "whole")["kv_lora_rank"] == 12

    walk = conversion.convert_layers

    def stop(*arguments, **options):
        yield next(walk(*arguments, **options))
        raise KeyboardInterrupt

    monkeypatch.setattr(conversion, "convert_layers", stop)
    assert convert(cli, source, tmp_path / "halves", calibration_text, *SIZES).exit_code == 130
    monkeypatch.setattr(conversion, "convert_layers", walk)
    assert convert(cli, source, tmp_path / "halves", calibration_text, *SIZES, "--resume").exit_code == 0
    for name in ("model.safetensors", "config.json"):
        assert (tmp_path / "halves" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def test_a_method_that_predicts_chooses_the_split(dummy, cli, source, calibration_text, tmp_path):
    planned = convert(cli, source, tmp_path / "out", calibration_text, "--kv-ratio", "0.5", "--dry-run")
    assert planned.exit_code == 0, planned.stderr
    plan = json.loads(planned.stdout)
    errors = [found["error"] for found in plan["predictions"]]
    assert len(errors) > 1
    assert errors == sorted(errors)
    # It predicts what its latent is large, so that the smallest wins.
    assert plan["kv_lora_rank"] == min(found["kv_lora_rank"] for found in plan["predictions"])


def test_a_method_can_be_healed_and_has_options(dummy, cli, source, calibration_text, tmp_path):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("method_options: {scale: 0.5}\nheal_steps: 2\n")
    healed = convert(cli, source, tmp_path / "healed", calibration_text, *SIZES, "--config", recipe)
    assert healed.exit_code == 0, healed.stderr
    assert json.loads(healed.stdout)["layers"][0]["error_before_healing"] is not None
    recipe.write_text("method_options: {sclae: 0.5}\n")
    wrong = convert(cli, source, tmp_path / "wrong", calibration_text, *SIZES, "--config", recipe)
    assert wrong.exit_code == 2
    assert wrong.stderr == (
        "Error: method_options of --method dummy: sclae: Extra inputs are not permitted; it has linear_ridge, scale.\n"
    )


def test_what_says_nothing_to_a_method_is_refused(dummy, cli, source, calibration_text, tmp_path):
    result = convert(cli, source, tmp_path / "out", calibration_text, *SIZES, "--freq-fold", "2")
    assert (result.exit_code, result.stderr) == (
        2,
        "Error: --freq-fold says nothing to --method dummy, which shares no slots: drop it.\n",
    )
    unknown = cli("convert", source, tmp_path / "out", "--method", "magic", *SIZES, "--calibration", calibration_text)
    assert unknown.stderr == "Error: --method magic is unknown: pass one of fitted, rorope, exact, dummy.\n"


def test_exact_is_a_method_and_a_flag(cli, source, tmp_path):
    for name, flags in (("method", ("--method", "exact")), ("flag", ("--exact",))):
        assert cli("convert", source, tmp_path / name, *flags, "-q").exit_code == 0
    first, second = ((tmp_path / name / "model.safetensors").read_bytes() for name in ("method", "flag"))
    assert first == second


@pytest.mark.parametrize(
    ("options", "learns", "refits"),
    [({}, True, True), ({"refit": False}, True, False), ({"error_feedback": False}, False, False)],
)
def test_ablations_are_options_of_the_method(options, learns, refits):
    method = Fitted(FittedOptions(**options))
    assert (method.learns_on_converted, method.refits) == (learns, refits)
