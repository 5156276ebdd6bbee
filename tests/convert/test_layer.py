"""One layer, against attention as a double loop over positions (``tests.convert.naive``)."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import pytest
import torch

from tests.convert.examples import (
    HIDDEN,
    TOKENS,
    exact,
    fitted,
    frequencies,
    make_goal,
    randn,
    random_moments,
    random_weights,
    rorope,
)
from tests.convert.naive import (
    latent_attention,
    latent_attention_matrix,
    latent_logits,
    relative_error,
    source_attention,
    source_logits,
)
from transmla.convert.methods.queries import compress_queries

METHODS = {"fitted": fitted, "rorope": rorope}
# query heads, key/value heads, head size: grouped, multi-query, multi-head
SHAPES = [(6, 2, 8), (3, 1, 10), (4, 4, 4)]


@pytest.fixture
def x():
    return randn(TOKENS, HIDDEN, seed=9)


@pytest.mark.parametrize("shape", SHAPES)
def test_exact_layer_is_the_same_attention(shape, x):
    weights, theta = random_weights(*shape), frequencies(shape[2])
    layer = exact(weights)
    cached = len(layer.latent) + len(layer.key_rope)
    assert cached == 2 * shape[1] * shape[2]
    assert layer.query_nope.shape[1] == 0
    found = latent_attention(layer, x, theta.repeat(shape[1]))
    assert relative_error(found, source_attention(weights, x, theta)) < 1e-10  # measured 2e-16


@pytest.mark.parametrize("rank", ["values", "keys and values"])
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("shape", SHAPES)
def test_a_slot_for_every_pair_is_the_identity(shape, method, rank, x):
    _, kv_heads, head_dim = shape
    weights, theta = random_weights(*shape), frequencies(head_dim)
    slots = theta.repeat_interleave(kv_heads)  # the slots of a group lie side by side
    key_size = kv_heads * head_dim
    goal = make_goal(key_size if rank == "values" else 2 * key_size, slots, theta, folds=(1,))
    converted = METHODS[method](weights, random_moments(weights), goal)
    assert converted.freq_fold == 1
    layer = converted.attention
    found = latent_attention(layer, x, slots)
    assert relative_error(found, source_attention(weights, x, theta)) < 1e-10  # measured 1e-14


@pytest.mark.parametrize("method", METHODS)
def test_folded_frequencies_that_are_equal_cost_nothing(method, x):
    heads, kv_heads, head_dim = 6, 2, 8
    weights = random_weights(heads, kv_heads, head_dim)
    theta = torch.tensor([1.0, 1.0, 0.2, 0.2], dtype=torch.float64)
    slots = theta.repeat_interleave(kv_heads)
    layer = METHODS[method](
        weights, random_moments(weights), make_goal(kv_heads * head_dim, slots, theta, folds=(2,))
    ).attention
    found = latent_attention(layer, x, slots)
    assert relative_error(found, source_attention(weights, x, theta)) < 1e-10  # measured 5e-15


@pytest.mark.parametrize("method", METHODS)
def test_without_rotation_few_slots_and_a_full_latent_are_the_identity(method, x):
    heads, kv_heads, head_dim = 6, 2, 8
    weights, still = random_weights(heads, kv_heads, head_dim), torch.zeros(4, dtype=torch.float64)
    goal = make_goal(2 * kv_heads * head_dim, still[:2], still, folds=(2,))
    layer = METHODS[method](weights, random_moments(weights), goal).attention
    assert len(layer.key_rope) == 4
    found = latent_attention(layer, x, still[:2])
    assert relative_error(found, source_attention(weights, x, still)) < 1e-10  # measured 5e-15


def test_what_has_no_slot_takes_the_expected_rotation_along(x):
    """Where all that counts lies at one distance, the expected rotation is the rotation, and its logits are exact."""
    heads, kv_heads, head_dim, distance = 6, 2, 8, 3
    weights, theta = random_weights(heads, kv_heads, head_dim), frequencies(head_dim)
    goal = make_goal(2 * kv_heads * head_dim, theta, theta, folds=(1,))
    expected = at_distance(source_logits(weights, x, theta), distance)
    errors = {}
    for method, convert in METHODS.items():
        layer = convert(weights, random_moments(weights, distance=distance), goal).attention
        errors[method] = relative_error(at_distance(latent_logits(layer, x, theta), distance), expected)
    assert errors["fitted"] < 1e-10  # measured 5e-15
    assert errors["rorope"] > 0.1  # it strips the rotation; measured 0.39


def at_distance(logits, distance):
    return torch.tensor([row[-1 - distance] for head in logits for row in head[distance:]], dtype=torch.float64)


def test_phases_between_heads_need_complex_mixing(x):
    """All heads carry one complex key at different phases: one slot a pair holds it, if it may be turned."""
    heads, kv_heads, head_dim = 6, 3, 8
    weights, theta = random_weights(heads, kv_heads, head_dim), frequencies(head_dim)
    common = torch.complex(*randn(2, head_dim // 2, HIDDEN, seed=20)) * HIDDEN**-0.5
    phases = torch.tensor([0.0, 2.1, 4.2], dtype=torch.float64)
    keys = torch.polar(torch.tensor([1.0, 0.7, 1.3], dtype=torch.float64), phases)[:, None, None] * common
    weights = replace(weights, key=torch.cat([keys.real, keys.imag], dim=1))
    expected = source_attention(weights, x, theta)
    # The latent holds the values and nothing else, so that what misses the slots is lost.
    goal = make_goal(kv_heads * head_dim, theta, theta, folds=(1,))
    errors = {}
    for method, convert in METHODS.items():
        layer = convert(weights, random_moments(weights), goal).attention
        errors[method] = relative_error(latent_attention(layer, x, theta), expected)
    assert errors["fitted"] < 1e-10  # measured 2e-14
    assert errors["rorope"] > 0.1  # measured 0.21


@pytest.mark.parametrize("method", METHODS)
def test_the_error_falls_with_the_rank(method, x):
    heads, kv_heads, head_dim = 6, 2, 8
    weights, theta = random_weights(heads, kv_heads, head_dim), frequencies(head_dim)
    slots = theta.repeat_interleave(kv_heads)
    expected = source_attention(weights, x, theta)
    errors = []
    for rank in (2, 6, 10, 14, 16):
        layer = METHODS[method](weights, random_moments(weights), make_goal(rank, slots, theta, folds=(1,))).attention
        errors.append(relative_error(latent_attention(layer, x, slots), expected))
    assert all(larger > smaller for larger, smaller in pairwise(errors))
    assert errors[-1] < 1e-10  # measured 5e-15


def test_complex_chooses_the_fold_with_the_least_predicted_error():
    heads, kv_heads, head_dim = 6, 2, 8
    weights = random_weights(heads, kv_heads, head_dim)
    moments = random_moments(weights)
    # Pairs of equal frequency: sharing slots is free and the choice of what they carry is wider.
    theta = torch.tensor([1.0, 1.0, 0.2, 0.2], dtype=torch.float64)
    slots = theta
    goal = make_goal(2 * kv_heads * head_dim, slots, theta, folds=(1, 2))
    fold = fitted(weights, moments, goal).freq_fold
    assert fold == 2


def test_rorope_wants_one_fold():
    weights, theta = random_weights(6, 2, 8), frequencies(8)
    with pytest.raises(ValueError, match="too many values to unpack"):
        rorope(weights, random_moments(weights), make_goal(16, theta, theta, folds=(1, 2)))


@pytest.mark.parametrize("method", ["exact", "fitted"])
def test_compressed_queries_at_full_rank_are_the_same(method, x):
    heads, kv_heads, head_dim = 6, 2, 8
    weights, theta = random_weights(heads, kv_heads, head_dim), frequencies(head_dim)
    moments = random_moments(weights)
    if method == "exact":
        layer, slots = exact(weights), theta.repeat(kv_heads)
    else:
        layer = fitted(weights, moments, make_goal(12, theta, theta, folds=(1, 2, 4))).attention
        slots = theta
    expected = latent_attention(layer, x, slots)
    errors = []
    for rank in (6, HIDDEN):
        compressed = compress_queries(layer, moments, rank=rank)
        assert compressed.query_down.shape == (rank, HIDDEN)
        errors.append(relative_error(latent_attention(compressed, x, slots), expected))
    assert errors[0] > 0.1  # measured 0.6 and 0.7
    assert errors[1] < 1e-10  # measured 4e-15


@pytest.mark.parametrize("low_rank_queries", [False, True])
def test_the_matrix_form_used_for_models_is_the_double_loop(low_rank_queries, x):
    """The two references agree, so that the tests of whole models stand on the loop as well."""
    weights, theta = random_weights(6, 2, 8), frequencies(8)
    moments = random_moments(weights)
    layer = fitted(weights, moments, make_goal(12, theta, theta, folds=(1, 2, 4))).attention
    if low_rank_queries:
        layer = compress_queries(layer, moments, rank=9)
    error = relative_error(latent_attention_matrix(layer, x, theta), latent_attention(layer, x, theta))
    assert error < 1e-12  # measured 4e-16


def test_inputs_are_left_as_they_are(x):
    weights, theta = random_weights(6, 2, 8), frequencies(8)
    moments = random_moments(weights)
    weights = replace(weights, output_bias=randn(HIDDEN, seed=9))
    before = [tensor.clone() for part in (weights, moments) for tensor in vars(part).values()]
    layer = fitted(weights, moments, make_goal(12, theta, theta, folds=(1, 2))).attention
    compress_queries(layer, moments, rank=9)
    rorope(weights, moments, make_goal(12, theta, theta, folds=(2,)))
    exact(weights)
    after = [tensor for part in (weights, moments) for tensor in vars(part).values()]
    assert all(torch.equal(old, new) for old, new in zip(before, after, strict=True))
