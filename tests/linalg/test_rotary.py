import cmath
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding, apply_rotary_pos_emb

from transmla.linalg.rotary import (
    as_real,
    expected_rotation,
    from_pairs,
    interleave,
    long_tail,
    rope_frequencies,
    rotate,
    rotate_interleaved,
    to_pairs,
)


def randn(*shape, dtype=torch.float64, seed=0):
    return torch.randn(*shape, dtype=dtype, generator=torch.Generator().manual_seed(seed))


def stock_rotary(head_dim, theta=10000.0):
    config = LlamaConfig(
        hidden_size=3 * head_dim,
        num_attention_heads=3,
        head_dim=head_dim,
        rope_parameters={"rope_type": "default", "rope_theta": theta},
    )
    return LlamaRotaryEmbedding(config)


@settings(max_examples=20, deadline=None)
@given(batch=st.lists(st.integers(1, 3), max_size=2), pairs=st.integers(1, 4), hidden=st.integers(1, 5))
def test_pairs_and_rows_are_each_other_s_inverse(batch, pairs, hidden):
    x = randn(*batch, 2 * pairs, hidden)
    z = to_pairs(x)
    assert z.shape == (*batch, pairs, hidden)
    assert torch.equal(from_pairs(z), x)
    assert torch.equal(to_pairs(from_pairs(z)), z)


def test_a_pair_is_a_row_and_the_row_half_a_head_further():
    x = torch.tensor([[1.0], [2.0], [3.0], [4.0], [5.0], [6.0]])
    assert to_pairs(x).flatten().tolist() == [1 + 4j, 2 + 5j, 3 + 6j]


def test_interleaved_rows_alternate_real_and_imaginary():
    z = torch.tensor([[1 + 4j, 7 - 1j], [2 + 5j, 0 + 0j]], dtype=torch.complex128)
    assert interleave(z).tolist() == [[1, 7], [4, -1], [2, 0], [5, 0]]
    assert interleave(z.expand(3, 2, 2)).shape == (3, 4, 2)


@pytest.mark.parametrize("tokens", [1, 9, 300])
def test_rotation_is_the_stock_models(tokens):
    x = randn(2, 3, tokens, 8, dtype=torch.float32)
    rotary = stock_rotary(8)
    cos, sin = rotary(x, torch.arange(tokens).unsqueeze(0))
    expected, _ = apply_rotary_pos_emb(x, x, cos, sin)
    assert torch.equal(rotate(x, rotary.inv_freq), expected)


def test_the_logit_of_rotated_vectors_is_the_complex_sum():
    tokens, frequencies = 5, torch.tensor([1.0, 0.3, 0.01])
    query, key = randn(tokens, 6, seed=1), randn(tokens, 6, seed=2)
    logits = rotate(query, frequencies) @ rotate(key, frequencies).mT
    for i in range(tokens):
        for j in range(tokens):
            expected = 0.0
            for pair, theta in enumerate(frequencies.tolist()):
                q = complex(query[i, pair], query[i, pair + 3])
                k = complex(key[j, pair], key[j, pair + 3])
                expected += (q * k.conjugate() * cmath.exp(1j * theta * (i - j))).real
            # `rotate` takes its cosines in float32, as the stock models do.
            assert abs(logits[i, j].item() - expected) < 1e-5  # measured 5e-7


def test_the_expected_rotation_is_an_average_over_distances():
    heads, distances = 3, 7
    weights = randn(heads, distances).square()
    weights /= weights.sum(-1, keepdim=True)
    frequency = randn(4, 2, seed=1)
    rho = expected_rotation(weights, frequency)
    assert rho.shape == (heads, 4, 2)
    for h in range(heads):
        for a in range(4):
            for b in range(2):
                expected = sum(
                    weights[h, delta].item() * cmath.exp(1j * frequency[a, b].item() * delta)
                    for delta in range(distances)
                )
                assert abs(rho[h, a, b].item() - expected) < 1e-12  # measured 3e-16
    assert rho.abs().max() < 1


def test_what_does_not_turn_or_is_never_far_keeps_its_place():
    weights = torch.full((2, 5), 0.2, dtype=torch.float64)
    still = expected_rotation(weights, torch.zeros(3, dtype=torch.float64))
    torch.testing.assert_close(still, torch.ones(2, 3, dtype=torch.complex128), rtol=0, atol=1e-15)
    here = torch.eye(5, dtype=torch.float64)[:1]
    assert torch.equal(expected_rotation(here, randn(3)), torch.ones(1, 3, dtype=torch.complex128))


@pytest.mark.parametrize("theta", [10000.0, 500000.0, 1.5])
@pytest.mark.parametrize("dim", [2, 8, 64, 128])
def test_the_grid_is_the_stock_models(dim, theta):
    grid = rope_frequencies(theta, dim)
    assert grid.shape == (dim // 2,)
    for slot, frequency in enumerate(grid.tolist()):
        assert math.isclose(frequency, theta ** (-2 * slot / dim), rel_tol=1e-14)
    # The stock model computes its grid in float32.
    torch.testing.assert_close(grid.float(), stock_rotary(dim, theta).inv_freq, rtol=1e-6, atol=0)  # measured 2e-7


def test_a_real_matrix_does_to_interleaved_rows_what_the_complex_one_does_to_pairs():
    matrix, z = torch.complex(*randn(2, 3, 4)), torch.complex(*randn(2, 4, 5, seed=1))
    torch.testing.assert_close(as_real(matrix) @ interleave(z), interleave(matrix @ z), rtol=0, atol=1e-13)


def test_interleaved_rotation_is_the_rotation_of_the_same_pairs():
    frequencies = rope_frequencies(100.0, 8)
    rows = randn(2, 7, 8)
    halves = torch.cat([rows[..., 0::2], rows[..., 1::2]], dim=-1)
    real, imaginary = rotate(halves, frequencies).chunk(2, dim=-1)
    found = rotate_interleaved(rows, frequencies)
    assert torch.equal(found[..., 0::2], real)
    assert torch.equal(found[..., 1::2], imaginary)


def test_a_long_tail_reaches_the_context_and_keeps_the_sum():
    distances = randn(3, 10).softmax(-1)
    longer, deltas = long_tail(distances, context=1000, share=0.2, points=5)
    assert deltas[:10].tolist() == list(range(10))
    assert deltas[10:].tolist() == pytest.approx([10 * 100 ** (i / 4) for i in range(5)], rel=1e-5)
    torch.testing.assert_close(longer.sum(-1), torch.ones(3, dtype=torch.float64))
    torch.testing.assert_close(longer[:, :10], 0.8 * distances)
    assert torch.equal(long_tail(distances, context=10, share=0.2)[0], distances)
