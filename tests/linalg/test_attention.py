import math

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from transmla.linalg.attention import attention_sums, diagonal_sums

BATCH, HEADS, TOKENS, HEAD_DIM, HIDDEN = 2, 3, 5, 4, 6
SCALE = 0.7


def randn(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


QUERY, KEY, VALUE = (randn(BATCH, HEADS, TOKENS, HEAD_DIM, seed=seed) for seed in range(3))
OUTPUT = randn(HEADS, HIDDEN, HEAD_DIM, seed=3)
JOINT = randn(BATCH, TOKENS, 7, seed=4)


def sums(query=QUERY, key=KEY, value=VALUE, joint=JOINT):
    return attention_sums(query, key, value, OUTPUT.mT @ OUTPUT, joint, scale=SCALE, stride=2)


def test_the_sums_are_loops_over_positions():
    token = torch.zeros(BATCH, TOKENS, dtype=torch.float64)
    mass = torch.zeros(HEADS, dtype=torch.float64)
    cost = torch.zeros(HEADS, TOKENS, dtype=torch.float64)
    key_cost = torch.zeros(BATCH, HEADS, TOKENS, dtype=torch.float64)
    query_cost = torch.zeros_like(key_cost)
    pooled = torch.zeros(BATCH, HEADS, 2, 7, dtype=torch.float64)
    for b in range(BATCH):
        for h in range(HEADS):
            for i in range(TOKENS):
                logits = [SCALE * sum((QUERY[b, h, i] * KEY[b, h, j]).tolist()) for j in range(i + 1)]
                total = sum(math.exp(logit) for logit in logits)
                probabilities = [math.exp(logit) / total for logit in logits]
                output = sum(p * VALUE[b, h, j] for j, p in enumerate(probabilities))
                if i % 2:
                    pooled[b, h, i // 2] = sum(p * JOINT[b, j] for j, p in enumerate(probabilities))
                for j, p in enumerate(probabilities):
                    token[b, j] += p**2
                    mass[h] += p**2
                    each = p**2 * (OUTPUT[h] @ (VALUE[b, h, j] - output)).norm() ** 2
                    cost[h, i - j] += each
                    key_cost[b, h, j] += each
                    query_cost[b, h, i] += each
    for got, expected in zip(sums(), (token, mass, cost, key_cost, query_cost, pooled), strict=True):
        torch.testing.assert_close(got, expected, rtol=0, atol=1e-12)  # measured 2e-14


def test_a_lone_token_attends_to_itself_at_no_cost():
    alone = sums(*(x[:, :, :1] for x in (QUERY, KEY, VALUE)), JOINT[:, :1])
    assert torch.equal(alone.token, torch.full((BATCH, 1), float(HEADS), dtype=torch.float64))
    assert torch.equal(alone.mass, torch.full((HEADS,), float(BATCH), dtype=torch.float64))
    assert alone.cost.max() < 1e-12  # measured 0


def test_a_cost_is_never_negative_and_the_inputs_stay_as_they_were():
    before = [x.clone() for x in (QUERY, KEY, VALUE, OUTPUT)]
    # Equal values cost nothing; in float32 the three terms of a square cancel to either side of zero.
    same = (100 * VALUE[:, :, :1]).expand_as(VALUE).float().contiguous()
    gram = (OUTPUT.mT @ OUTPUT).float()
    found = attention_sums(QUERY.float(), KEY.float(), same, gram, JOINT.float(), scale=SCALE, stride=1)
    assert min(found.cost.min(), found.key_cost.min(), found.query_cost.min()) >= 0
    assert all(torch.equal(a, b) for a, b in zip(before, (QUERY, KEY, VALUE, OUTPUT), strict=True))


@settings(max_examples=20, deadline=None)
@given(heads=st.integers(1, 3), tokens=st.integers(1, 6))
def test_a_diagonal_is_summed_where_it_lies(heads, tokens):
    matrix = randn(heads, tokens, tokens)
    expected = torch.zeros(heads, tokens, dtype=torch.float64)
    for h in range(heads):
        for i in range(tokens):
            for j in range(i + 1):
                expected[h, i - j] += matrix[h, i, j]
    torch.testing.assert_close(diagonal_sums(matrix), expected, rtol=0, atol=1e-13)
