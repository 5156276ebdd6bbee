"""Moments against a double loop over positions, written in plain arithmetic from the definition of attention."""

import cmath
import dataclasses
import math

import pytest
import torch
from transformers import LlamaConfig

from tests.factory import SIZES, random_model
from transmla.arch.spec import describe
from transmla.calibration import moments
from transmla.calibration.moments import AttentionWeights, Moments, MomentSums
from transmla.calibration.stream import Attended

HEADS, KV_HEADS, HEAD_DIM, HIDDEN = 6, 2, 16, 48
JOINT = 2 * KV_HEADS * HEAD_DIM
WINDOWS, TOKENS = 3, 7
CONFIG = LlamaConfig(**SIZES)
SPEC = describe(CONFIG)


@pytest.fixture(scope="module")
def projections():
    attention = random_model(CONFIG).model.layers[0].self_attn
    return {name: weight.detach() for name, weight in attention.state_dict().items()}


@pytest.fixture(scope="module")
def weights(projections):
    return cut(projections)


@pytest.fixture(scope="module")
def inputs():
    return torch.randn(WINDOWS, TOKENS, HIDDEN, generator=torch.Generator().manual_seed(1))


def cut(projections):
    return AttentionWeights.from_projections(
        SPEC, **{name.removesuffix(".weight"): weight for name, weight in projections.items()}
    )


def sums(weights, *batches, tokens=TOKENS):
    added = MomentSums(weights, SPEC, tokens=tokens)
    for batch in batches:
        added.add(attended(weights, batch))
    return added.finish()


def attended(weights, batch):
    projected = [batch @ weight.flatten(0, 1).T for weight in (weights.query, weights.key, weights.value)]
    return Attended(batch, *projected, output=torch.zeros_like(batch), residual=torch.ones_like(batch))


def by_loops(projections, inputs):
    """The same moments from nothing but the four matrices of the source layer."""
    q_proj, k_proj, v_proj, o_proj = (projections[f"{kind}_proj.weight"].double() for kind in "qkvo")
    windows, tokens, _ = inputs.shape
    count = windows * tokens
    uniform = torch.zeros(HIDDEN, HIDDEN, dtype=torch.float64)
    attended, received = uniform.clone(), 0.0
    cost = torch.zeros(HEADS, tokens, dtype=torch.float64)
    mass = torch.zeros(HEADS, dtype=torch.float64)
    key_moment = torch.zeros(KV_HEADS, JOINT + 1, JOINT + 1, dtype=torch.float64)
    query_moment = torch.zeros(HEADS, HEAD_DIM, HEAD_DIM, dtype=torch.float64)
    pooled_moment = torch.zeros(HEADS, JOINT, JOINT, dtype=torch.float64)
    num_pooled = 0
    for window in inputs.double():
        cached = [torch.cat([*map(side_by_side, (k_proj @ x).split(HEAD_DIM)), v_proj @ x]) for x in window]
        for x in window:
            uniform += torch.outer(x, x) / count
        for h in range(HEADS):
            g = h // (HEADS // KV_HEADS)
            rows, columns = slice(g * HEAD_DIM, (g + 1) * HEAD_DIM), slice(h * HEAD_DIM, (h + 1) * HEAD_DIM)
            keys, values = window @ k_proj[rows].T, window @ v_proj[rows].T
            queries = window @ q_proj[columns].T
            for i in range(tokens):
                weights = [math.exp(source_logit(queries[i], keys[j], i - j)) for j in range(i + 1)]
                probabilities = [weight / sum(weights) for weight in weights]
                output = sum(p * values[j] for j, p in enumerate(probabilities))
                if i % 4 == 2:
                    pooled = sum(p * cached[j] for j, p in enumerate(probabilities))
                    pooled_moment[h] += torch.outer(pooled, pooled)
                    num_pooled += 1 / HEADS
                for j, p in enumerate(probabilities):
                    attended += p**2 * torch.outer(window[j], window[j])
                    received += p**2
                    mass[h] += p**2 / count
                    each = p**2 * (o_proj[:, columns] @ (values[j] - output)).norm() ** 2 / count
                    cost[h, i - j] += each
                    token = torch.cat([cached[j], torch.ones(1)])
                    key_moment[g] += each * torch.outer(token, token)
                    query = side_by_side(queries[i])
                    query_moment[h] += each * torch.outer(query, query)
    spread = cost.sum(-1)
    joint = torch.cat([*map(side_by_side, k_proj.split(HEAD_DIM)), v_proj])
    return Moments(
        uniform=uniform,
        attended=attended / received,
        distances=cost / spread.unsqueeze(-1),
        mass=mass,
        spread=spread,
        keys=key_moment / spread.unflatten(0, (KV_HEADS, -1)).sum(-1)[:, None, None],
        # Single tokens count one part in twenty.
        values=pooled_moment / num_pooled + 0.05 * mass[:, None, None] * joint @ (attended / received) @ joint.T,
        queries=query_moment,
    )


def side_by_side(rows):
    """Put the two numbers of each rotary pair beside each other."""
    return torch.stack([rows[pair + half] for pair in range(HEAD_DIM // 2) for half in (0, HEAD_DIM // 2)])


def source_logit(query, key, delta):
    logit = 0.0
    for pair in range(HEAD_DIM // 2):
        theta = 10000.0 ** (-2 * pair / HEAD_DIM)
        q = complex(query[pair], query[pair + HEAD_DIM // 2])
        k = complex(key[pair], key[pair + HEAD_DIM // 2])
        logit += (q * k.conjugate() * cmath.exp(1j * theta * delta)).real
    return logit / math.sqrt(HEAD_DIM)


def assert_same(got, expected, *, tolerance):
    for field in dataclasses.fields(Moments):
        a, b = getattr(got, field.name), getattr(expected, field.name)
        assert a.shape == b.shape
        assert a.dtype == torch.float64
        error = (a - b).abs().max() / b.abs().max()
        assert error < tolerance, f"{field.name} is off by {error:.1e}"


def test_moments_are_loops_over_windows_heads_queries_and_keys(projections, weights, inputs):
    # Products run in float32: measured 4e-7.
    assert_same(sums(weights, inputs), by_loops(projections, inputs), tolerance=1e-5)


def test_moments_are_averages(weights, inputs):
    result = sums(weights, inputs)
    torch.testing.assert_close(result.distances.sum(-1), torch.ones(HEADS, dtype=torch.float64), rtol=0, atol=1e-12)
    assert (result.mass < 1).all()
    assert torch.linalg.eigvalsh(result.attended).min() > -1e-5  # measured -3e-7
    twice = sums(weights, inputs, inputs)
    assert_same(twice, result, tolerance=1e-12)


@pytest.mark.parametrize("cut_at", [1, 2])
def test_it_does_not_matter_how_windows_come_in_batches(weights, inputs, cut_at):
    whole = sums(weights, inputs)
    assert_same(sums(weights, inputs[:cut_at], inputs[cut_at:]), whole, tolerance=1e-6)  # measured 1e-7


def test_a_batch_is_worked_through_in_pieces_that_fit(weights, inputs, monkeypatch):
    whole, seen = sums(weights, inputs), []
    attention_sums = moments.attention_sums

    def watched(query, *args, **kwargs):
        seen.append(len(query))
        return attention_sums(query, *args, **kwargs)

    monkeypatch.setattr(moments, "attention_sums", watched)
    for limit, pieces in ((2 * HEADS * TOKENS**2, [2, 1]), (1, [1, 1, 1])):
        monkeypatch.setattr(moments, "_MAX_PROBABILITIES", limit)
        seen.clear()
        assert_same(sums(weights, inputs), whole, tolerance=1e-6)  # measured 1e-7
        assert seen == pieces


def test_inputs_in_half_precision_are_widened_first(weights, inputs):
    half = Attended(*(tensor.bfloat16() for tensor in attended(weights, inputs)))
    full = Attended(*(tensor.float() for tensor in half))
    results = []
    for batch in (half, full):
        added = MomentSums(weights, SPEC, tokens=TOKENS)
        added.add(batch)
        results.append(added.finish())
    assert_same(*results, tolerance=1e-15)


def test_a_head_that_puts_out_nothing_counts_all_distances_alike(projections, inputs):
    silent = dict(projections)
    silent["o_proj.weight"] = projections["o_proj.weight"].clone()
    silent["o_proj.weight"][:, 2 * HEAD_DIM : 3 * HEAD_DIM] = 0
    result, plain = sums(cut(silent), inputs), sums(cut(projections), inputs)
    assert result.spread[2] == 0
    assert torch.equal(result.distances[2], torch.full((TOKENS,), 1 / TOKENS, dtype=torch.float64))
    others = [head for head in range(HEADS) if head != 2]
    assert torch.equal(result.distances[others], plain.distances[others])


def test_projections_are_cut_into_heads(projections, weights):
    for h in range(HEADS):
        rows = slice(h * HEAD_DIM, (h + 1) * HEAD_DIM)
        assert torch.equal(weights.query[h], projections["q_proj.weight"][rows])
        assert torch.equal(weights.output[h], projections["o_proj.weight"][:, rows])
    for g in range(KV_HEADS):
        rows = slice(g * HEAD_DIM, (g + 1) * HEAD_DIM)
        assert torch.equal(weights.key[g], projections["k_proj.weight"][rows])
        assert torch.equal(weights.value[g], projections["v_proj.weight"][rows])


def test_without_data_inputs_are_white_and_distances_uniform_in_their_logarithm(weights):
    result = Moments.from_weights(weights, window=5)
    white = torch.eye(HIDDEN, dtype=torch.float64)
    assert torch.equal(result.uniform, white)
    assert torch.equal(result.attended, white)
    assert torch.equal(result.mass, torch.ones(HEADS, dtype=torch.float64))
    harmonic = 1 + 1 / 2 + 1 / 3 + 1 / 4 + 1 / 5
    for h in range(HEADS):
        expected = torch.tensor([1 / (delta + 1) / harmonic for delta in range(5)], dtype=torch.float64)
        torch.testing.assert_close(result.distances[h], expected, rtol=1e-12, atol=0)
        value = weights.value[h // 3].double()
        # E‖W_O v‖² of a value of white input.
        spread = (weights.output[h].double() @ value).square().sum()
        assert result.spread[h].item() == pytest.approx(spread.item(), rel=1e-6)  # measured 3e-8
