"""Predicted errors against a computation by hand: the source as transformers runs it, regressions at every distance."""

from __future__ import annotations

import math

import pytest
import torch
from transformers import AutoModelForCausalLM

from tests.convert.models import CALIBRATION
from tests.factory import tiny_checkpoint
from transmla.config import ConvertRequest
from transmla.convert import predict as prediction
from transmla.convert.methods import fitted
from transmla.convert.run import prepare
from transmla.convert.summary import Prediction
from transmla.deepseek.sizes import MLASizes

SPLITS = (MLASizes(12, 4, 16, 16), MLASizes(8, 8, 16, 16))


def rotation(frequencies, delta):
    """The matrix that turns interleaved pairs back by ``delta`` tokens."""
    blocks = []
    for angle in (frequencies * delta).tolist():
        cosine, sine = math.cos(angle), math.sin(angle)
        blocks.append(torch.tensor([[cosine, sine], [-sine, cosine]]).double())
    return torch.block_diag(*blocks)


def left(moment, own, ridge):
    """What a regression on all but the first ``own`` numbers leaves of them, from their moment."""
    diagonal = moment.diagonal()[own:]
    inverse = torch.linalg.inv(moment[own:, own:] + torch.diag(ridge * (diagonal + 1e-2 * diagonal.mean())))
    best = moment[:own, own:] @ inverse
    joined = torch.cat([torch.eye(own).double(), -best], dim=1)
    return joined @ moment @ joined.T + best @ torch.diag(ridge * (diagonal + 1e-2 * diagonal.mean())) @ best.T


def costs_by_hand(problem, functionals):
    """The key cost and the value cost of one layer, head by head, distance by distance."""
    heads, size, _ = problem.queries.shape
    kv_heads, rope = len(problem.keys), problem.rope
    latent = functionals[rope:]
    keys = values = 0.0
    for h in range(heads):
        g = h // (heads // kv_heads)
        own = torch.eye(functionals.shape[1]).double()[g * size : (g + 1) * size]
        moment = 0
        for delta, share in zip(problem.deltas.tolist(), problem.distances[h].tolist(), strict=True):
            rows = torch.cat(
                [
                    rotation(problem.pair_frequencies, delta) @ own,
                    rotation(problem.slot_frequencies, delta) @ functionals[:rope],
                    latent,
                ]
            )
            rows = torch.block_diag(rows, torch.ones(1, 1).double())
            moment = moment + share * rows @ problem.keys[g] @ rows.T
        keys += (left(moment, size, problem.ridge) * problem.queries[h]).sum().item()
        own = torch.eye(functionals.shape[1]).double()[(kv_heads + g) * size :][:size]
        rows = torch.cat([own, latent])
        values += (left(rows @ problem.values[h] @ rows.T, size, problem.ridge) * problem.output_gram[h]).sum().item()
    return keys, values


def residuals_by_hand(folder, windows):
    """The mean squared length of the residual stream after each attention, from the stock model."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    seen = []
    for layer in model.model.layers:
        # What the second norm is given is the stream after the attention.
        layer.post_attention_layernorm.register_forward_pre_hook(
            lambda _, inputs: seen.append(inputs[0].double().square().sum(-1).mean().item())
        )
    with torch.no_grad():
        model(windows)
    return seen


@pytest.fixture(scope="module")
def case(tmp_path_factory, calibration_text):
    """A plan without a search, its windows, and the problem and the functionals of every layer and split."""
    folder = tmp_path_factory.mktemp("source")
    tiny_checkpoint(folder)
    request = ConvertRequest(
        model=str(folder),
        output_dir=folder.parent / "out",
        kv_lora_rank=12,
        qk_rope_head_dim=4,
        calibration=str(calibration_text),
        method_options={"refine_steps": 0},
        **CALIBRATION,
    )
    plan, windows = prepare(request, predict=False)
    real, problems = fitted._cache_problem, []

    def keep(weights, moments, goal, ridge):
        problem = real(weights, moments, goal, ridge)
        problems.append((problem, fitted._start(weights, moments, goal)[0]))
        return problem

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fitted, "_cache_problem", keep)
        found = prediction.predict_splits(plan, windows, SPLITS)
    return folder, plan, windows, found, problems


def test_an_error_is_the_weighted_cost_of_keys_and_values(case):
    folder, plan, windows, found, problems = case
    residuals = residuals_by_hand(folder, windows[plan.counts.fit])
    assert len(problems) == len(SPLITS) * len(residuals)
    for index, split in enumerate(SPLITS):
        by_layer = [costs_by_hand(*problem) for problem in problems[index :: len(SPLITS)]]
        keys, values = (
            sum(costs[part] / residual for costs, residual in zip(by_layer, residuals, strict=True)) / len(residuals)
            for part in (0, 1)
        )
        [one] = [one for one in found if one.kv_lora_rank == split.kv_lora_rank]
        assert one.key_error == pytest.approx(math.sqrt(keys), rel=1e-5)  # measured 6e-9
        assert one.value_error == pytest.approx(math.sqrt(values), rel=1e-5)
        assert one.error == pytest.approx(math.sqrt(keys / 3.5 + values), rel=1e-5)
        # Both count, so that neither can be left out unnoticed.
        assert min(keys, values) > 0.05 * max(keys, values)


def test_the_search_itself_takes_keys_and_values_at_par(case):
    *_, problems = case
    problem, functionals = problems[0]
    keys, values = problem.costs(functionals)
    assert torch.equal(problem.cost(functionals), keys + values)
    assert keys > 0 < values


def test_sizes_are_compared_on_windows_that_are_fitted_on_and_on_no_other(case):
    _, plan, windows, *_ = case
    assert plan.counts.num_fit <= 16
    assert len(windows) == plan.counts.num_fit + plan.counts.num_heldout
    assert torch.equal(prediction.prediction_windows(plan, windows), windows[plan.counts.fit])


def test_a_prediction_of_an_earlier_version_is_read():
    old = Prediction.model_validate({"kv_lora_rank": 8, "qk_rope_head_dim": 2, "error": 0.5})
    assert (old.key_error, old.value_error, old.error) == (None, None, 0.5)
