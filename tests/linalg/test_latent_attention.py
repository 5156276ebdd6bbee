import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.flop_counter import FlopCounterMode

from transmla.linalg.latent_attention import absorbing_is_cheaper, latent_attention

BATCH, HEADS, QUERIES, TOKENS, RANK, NOPE, ROPE, VALUE = 2, 3, 5, 11, 7, 4, 6, 8
SCALE = 0.7


def randn(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def operands(nope=NOPE):
    return (
        randn(BATCH, HEADS, QUERIES, nope, seed=1),
        randn(BATCH, HEADS, QUERIES, ROPE, seed=2),
        randn(BATCH, TOKENS, RANK, seed=3),
        randn(BATCH, TOKENS, ROPE, seed=4),
        randn(HEADS, nope, RANK, seed=5),
        randn(HEADS, VALUE, RANK, seed=6),
    )


ALLOWED = torch.rand(BATCH, 1, QUERIES, TOKENS, generator=torch.Generator().manual_seed(7)) < 0.6
ADDED = randn(1, HEADS, 1, TOKENS, seed=8)
MASKS = {"none": None, "allowed": ALLOWED, "added": ADDED}


def expanded(query_nope, query_rope, latent, key_rope, up_key, up_value, mask):
    """Make the keys and values of every head, as the formula has them."""
    key = torch.cat([torch.einsum("btr,hnr->bhtn", latent, up_key), key_rope[:, None].expand(-1, HEADS, -1, -1)], -1)
    logits = SCALE * torch.cat([query_nope, query_rope], -1) @ key.mT
    if mask is not None:
        logits = logits.masked_fill(~mask, float("-inf")) if mask.dtype == torch.bool else logits + mask
    weights = logits.softmax(-1)
    return (weights @ torch.einsum("btr,hvr->bhtv", latent, up_value)).transpose(1, 2), weights


@pytest.mark.parametrize("nope", [NOPE, 0])
@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("chunk", [None, 1, 2, 5])
def test_both_orders_give_the_same(nope, mask, chunk):
    arguments = (*operands(nope), MASKS[mask])
    found = latent_attention(*arguments, scale=SCALE, keep_weights=True, chunk=chunk)
    for got, expected in zip(found, expanded(*arguments), strict=True):
        torch.testing.assert_close(got, expected, rtol=0, atol=1e-12)  # measured 1e-14
    output, weights = latent_attention(*arguments, scale=SCALE, chunk=chunk)
    assert torch.equal(output, found[0])
    assert weights is None


def test_a_query_that_may_attend_to_nothing_stays_finite():
    mask = ALLOWED.clone()
    mask[0, :, 2] = False
    output, _ = latent_attention(*operands(), mask, scale=SCALE)
    assert output.isfinite().all()


@given(
    queries=st.integers(1, 40),
    tokens=st.integers(2, 60),
    rank=st.integers(2, 20),
    nope=st.integers(2, 12),
    rope=st.integers(2, 8),
    value=st.integers(2, 12),
)
def test_the_choice_is_that_of_fewer_multiplications(queries, tokens, rank, nope, rope, value):
    def zeros(*shape):
        return torch.zeros(shape, device="meta")

    up_key, up_value = zeros(HEADS, nope, rank), zeros(HEADS, value, rank)
    query_nope, query_rope = zeros(1, HEADS, queries, nope), zeros(1, HEADS, queries, rope)
    latent, key_rope = zeros(1, tokens, rank), zeros(1, tokens, rope)
    with FlopCounterMode(display=False) as absorbed:
        latent_attention(query_nope, query_rope, latent, key_rope, up_key, up_value, None, scale=1.0)
    with FlopCounterMode(display=False) as stock:
        expanded(query_nope, query_rope, latent, key_rope, up_key, up_value, None)
    cheaper = absorbing_is_cheaper(queries=queries, tokens=tokens, rank=rank, nope=nope, rope=rope, value=value)
    assert cheaper == (absorbed.get_total_flops() < stock.get_total_flops())
