"""Refitting and healing on data: what a layer does after it has been chosen."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from tests.convert.examples import HIDDEN, TOKENS, fitted, frequencies, make_goal, randn, random_moments, random_weights
from tests.convert.naive import latent_attention, relative_error, source_attention
from transmla.convert.fit import heal
from transmla.convert.fit.heal import heal_layer
from transmla.convert.fit.refit import refit_output
from transmla.convert.fit.targets import LayerTargets
from transmla.convert.fit.targets import relative_error as measured_error
from transmla.convert.methods.queries import compress_queries

HEADS, KV_HEADS, HEAD_DIM, RANK, WINDOWS = 6, 2, 8, 9, 40
THETA = frequencies(HEAD_DIM)
WEIGHTS = random_weights(HEADS, KV_HEADS, HEAD_DIM)


@pytest.fixture(scope="module")
def layer():
    return fitted(WEIGHTS, random_moments(WEIGHTS), make_goal(RANK, THETA, THETA, folds=(2,))).attention


@pytest.fixture(scope="module")
def targets():
    inputs = randn(WINDOWS, TOKENS, HIDDEN, seed=40)
    outputs = torch.stack([source_attention(WEIGHTS, window, THETA) for window in inputs])
    return LayerTargets(inputs, outputs, randn(WINDOWS, TOKENS, seed=41).abs() + 0.1)


def part(targets, rows):
    return LayerTargets(targets.inputs[rows], targets.outputs[rows], targets.weights[rows])


@pytest.mark.parametrize("compressed", [False, True])
def test_plain_factors_attend_as_the_double_loop(layer, compressed):
    x = randn(TOKENS, HIDDEN, seed=42)
    layer = compress_queries(layer, random_moments(WEIGHTS), rank=9) if compressed else layer
    found = layer.attend(x.unsqueeze(0), THETA)[0]
    # RoPE's tables are in float32: measured 4e-8.
    assert relative_error(found, latent_attention(layer, x, THETA)) < 1e-6


def test_the_loss_is_a_share_of_what_is_wanted_and_the_report_one_of_the_stream(layer, targets):
    weighted_wrong = weighted_total = 0.0
    for x, y, w in zip(targets.inputs, targets.outputs, targets.weights, strict=True):
        found = layer.attend(x.unsqueeze(0), THETA)[0]
        for t in range(TOKENS):
            weighted_wrong += (w[t] * ((found[t] - y[t]) ** 2).sum()).item()
            weighted_total += (w[t] * (y[t] ** 2).sum()).item()
    assert targets.loss(layer, THETA).item() == pytest.approx(weighted_wrong / weighted_total, rel=1e-9)
    for batch_size in (7, WINDOWS):
        found = measured_error(layer, targets, THETA, batch_size=batch_size)
        assert found == pytest.approx((weighted_wrong / HIDDEN / (WINDOWS * TOKENS)) ** 0.5, rel=1e-9)


def test_refitting_w_o_is_the_least_squares_solution_of_all_tokens(layer, targets):
    refitted = refit_output(layer, targets, THETA, batch_size=7)
    features = layer.heads_output(targets.inputs, THETA).permute(0, 2, 1, 3).flatten(2).flatten(0, 1)
    weights = targets.weights.flatten().unsqueeze(-1)
    energy = (features.square() * weights).sum(0)
    pull = 1e-2 * energy + 1e-9 * energy.mean()
    before = layer.output.permute(0, 2, 1).flatten(0, 1)
    # The ridge as rows of a plain least squares problem.
    rows = torch.cat([features * weights.sqrt(), torch.diag(pull.sqrt())])
    wanted = torch.cat([targets.outputs.flatten(0, 1) * weights.sqrt(), pull.sqrt().unsqueeze(-1) * before])
    expected = torch.linalg.lstsq(rows, wanted).solution
    torch.testing.assert_close(refitted.output.permute(0, 2, 1).flatten(0, 1), expected, rtol=1e-8, atol=1e-10)
    assert targets.loss(refitted, THETA) < 0.9 * targets.loss(layer, THETA)  # measured 0.7
    assert refitted.latent is layer.latent


def test_refitting_repairs_a_scaled_output(targets):
    """With nothing lost, W_O comes back from being wrong but for the pull towards where it was."""
    exact = fitted(
        WEIGHTS, random_moments(WEIGHTS), make_goal(16, THETA.repeat_interleave(2), THETA, folds=(1,))
    ).attention
    slots = THETA.repeat_interleave(2)
    halved = replace(exact, output=exact.output / 2)
    repaired = refit_output(halved, targets, slots, batch_size=WINDOWS)
    assert targets.loss(halved, slots).item() == pytest.approx(0.25, rel=1e-6)
    assert targets.loss(repaired, slots) < 1e-3  # measured 3e-4


def test_healing_lowers_the_error_on_windows_it_has_not_seen(layer, targets):
    train, test = part(targets, slice(0, 32)), part(targets, slice(32, None))
    hurt = layer.map(lambda factor: factor * (1 + 0.3 * randn(*factor.shape, seed=43)))
    healed, gain = heal_layer(hurt, train, THETA, steps=60, batch_size=8, seed=0)
    assert gain > 0.2
    assert test.loss(healed, THETA) < 0.8 * test.loss(hurt, THETA)


def test_healing_repeats_itself_under_a_seed_and_leaves_its_input_alone(layer, targets):
    hurt = layer.map(lambda factor: factor * (1 + 0.3 * randn(*factor.shape, seed=43)))
    before = [factor.clone() for factor in hurt.factors]
    runs = [heal_layer(hurt, targets, THETA, steps=5, batch_size=8, seed=seed).attention for seed in (3, 3, 4)]
    assert all(torch.equal(a, b) for a, b in zip(runs[0].factors, runs[1].factors, strict=True))
    assert not torch.equal(runs[0].latent, runs[2].latent)
    assert all(torch.equal(a, b) for a, b in zip(hurt.factors, before, strict=True))
    assert not any(factor.requires_grad for factor in runs[0].factors)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_healing_runs_in_the_type_that_was_asked_for(layer, targets, dtype):
    """Half precision only when asked: without units for it a processor is a hundred times slower."""
    seen = set()

    class Products(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if func in (torch.ops.aten.bmm.default, torch.ops.aten.mm.default):
                seen.add(args[0].dtype)
            return func(*args, **(kwargs or {}))

    single = LayerTargets(targets.inputs.float(), targets.outputs.float(), targets.weights.float())
    with Products():
        heal_layer(layer.map(Tensor.float), single, THETA, steps=2, batch_size=8, seed=0, dtype=dtype)
    halves = set() if dtype == torch.float32 else {torch.bfloat16}
    assert seen - {torch.float32} == halves


def test_healing_that_does_not_help_is_thrown_away(layer, targets):
    """The windows that judge come first; make them say the opposite of what the others teach."""
    held_back = WINDOWS // 10
    outputs = torch.cat([layer.attend(targets.inputs[:held_back], THETA), -targets.outputs[held_back:]])
    confused = LayerTargets(targets.inputs, outputs, targets.weights)
    assert heal_layer(layer, confused, THETA, steps=20, batch_size=8, seed=0) == (layer, 0.0)


def test_no_steps_change_nothing(layer, targets):
    assert heal_layer(layer, targets, THETA, steps=0, batch_size=8, seed=0) == (layer, 0.0)
    assert heal_layer(layer, part(targets, slice(0, 1)), THETA, steps=9, batch_size=8, seed=0) == (layer, 0.0)


def test_the_best_point_is_kept_and_more_steps_never_hurt(layer, targets):
    """On the windows that judge whatever is returned is no worse than the start."""
    judge = part(targets, slice(0, WINDOWS // 10))
    start = judge.loss(layer, THETA).item()
    for steps in (1, 4, 40, 160):
        healed, gain = heal_layer(layer, targets, THETA, steps=steps, batch_size=8, seed=0)
        assert judge.loss(healed, THETA).item() == pytest.approx((1 - gain) * start, rel=1e-9)
        assert gain >= 0


def test_between_the_start_and_a_point_that_went_too_far_something_is_better(layer, targets, monkeypatch):
    """Steps of one great length in the right direction: none of them is better than the start, part of one is."""
    hurt = layer.map(lambda factor: factor * (1 + 0.2 * randn(*factor.shape, seed=43)))

    def too_far(start, *_):
        ends = iter(layer.factors)
        yield start.map(lambda factor: factor + 2 * (next(ends) - factor))

    monkeypatch.setattr(heal, "_points", too_far)
    judge = part(targets, slice(0, WINDOWS // 10))
    healed, gain = heal_layer(hurt, targets, THETA, steps=9, batch_size=8, seed=0)
    assert gain > 0
    assert judge.loss(healed, THETA) < judge.loss(hurt, THETA)
