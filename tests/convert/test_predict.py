"""Sizes that are chosen by predicted error: what is compared, what is chosen, and whether the prediction holds."""

from __future__ import annotations

import pytest
import yaml

from tests.convert.examples import make_request, make_spec
from tests.convert.models import asked, load_tensors
from tests.factory import tiny_checkpoint
from transmla.checkpoint import reader
from transmla.config import ConvertRequest
from transmla.convert import plan as planning
from transmla.convert.run import convert, prepare
from transmla.convert.sizes import candidate_splits, choose_sizes


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return tiny_checkpoint(tmp_path_factory.mktemp("source"))


def splits(**choices):
    return [(s.kv_lora_rank, s.qk_rope_head_dim) for s in candidate_splits(make_request(**choices), make_spec())]


def test_a_budget_can_be_split_in_several_ways_that_all_keep_it():
    assert splits(kv_ratio=0.5) == [(24, 8), (30, 2), (28, 4), (16, 16)]
    assert splits(kv_ratio=0.5, freq_fold=2) == [(24, 8), (16, 16)]
    assert splits(kv_lora_rank=21, qk_rope_head_dim=6) == [(21, 6)]
    assert splits(exact=True) == [(32, 32)]


def test_an_engine_with_sizes_of_its_own_leaves_no_choice():
    wide, request = make_spec(heads=32, kv_heads=8, head_dim=64, hidden=2048), make_request(kv_ratio=0.5, engine="vllm")
    assert candidate_splits(request, wide) == (choose_sizes(request, wide),)


def test_the_split_of_least_predicted_error_is_taken(source, tmp_path, calibration_text):
    report = convert(asked(source, tmp_path / "out", calibration_text, kv_ratio=0.5))
    predictions = report.plan.predictions
    assert {(p.kv_lora_rank, p.qk_rope_head_dim) for p in predictions} == {(24, 8), (30, 2), (28, 4), (16, 16)}
    assert [p.error for p in predictions] == sorted(p.error for p in predictions)
    assert (report.plan.kv_lora_rank, report.plan.qk_rope_head_dim) == (
        predictions[0].kv_lora_rank,
        predictions[0].qk_rope_head_dim,
    )
    # The recipe names the sizes, so that it repeats the result without the search.
    recipe = yaml.safe_load((tmp_path / "out" / "transmla_recipe.yaml").read_text())
    again = convert(ConvertRequest(**{**recipe, "output_dir": tmp_path / "again"}))
    assert again.plan.predictions == ()
    first, second = load_tensors(tmp_path / "out", None), load_tensors(tmp_path / "again", None)
    assert first.keys() == second.keys()
    assert all(first[name].equal(second[name]) for name in first)


def test_predictions_order_sizes_as_the_measured_errors_do(source, tmp_path, calibration_text):
    sizes = [(8, 2), (12, 4), (24, 8), (44, 16)]
    predicted, measured = [], []
    for rank, rope in sizes:
        request = asked(source, tmp_path / f"{rank}", calibration_text, kv_lora_rank=rank, qk_rope_head_dim=rope)
        plan, _ = prepare(request)
        [prediction] = plan.predictions
        predicted.append(prediction.error)
        measured.append(convert(request).mean_relative_error)
    assert predicted == sorted(predicted, reverse=True)
    assert measured == sorted(measured, reverse=True)


@pytest.mark.parametrize("choices", [{"method": "rorope"}, {"calibration": "none"}])
def test_without_a_prediction_the_plain_rule_decides(choices, source, tmp_path, calibration_text):
    plan, _ = prepare(asked(source, tmp_path / "out", calibration_text, kv_ratio=0.5, **choices))
    assert plan.predictions == ()
    assert plan.sizes == choose_sizes(plan.request, plan.spec)


def test_a_source_is_opened_once_however_many_sizes_are_compared(source, tmp_path, calibration_text, monkeypatch):
    opened = []
    for module, name in ((planning, "open_model"), (planning, "fetch_weights"), (reader, "_read_all_headers")):
        real = getattr(module, name)
        monkeypatch.setattr(module, name, lambda *a, n=name, f=real, **k: (opened.append(n), f(*a, **k))[1])
    plan, _ = prepare(asked(source, tmp_path / "out", calibration_text, kv_ratio=0.5))
    assert len(plan.predictions) > 1
    compared = list(opened)
    opened.clear()
    prepare(asked(source, tmp_path / "out", calibration_text, kv_lora_rank=24, qk_rope_head_dim=8))
    assert compared == opened
