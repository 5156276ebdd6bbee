"""The truncation against references that share nothing with it: traces written as loops, and a whitened SVD."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from transmla.linalg.hermitian import sqrt_psd
from transmla.linalg.low_rank import low_rank, pad

DTYPES = (torch.float64, torch.complex128)


def generator(seed):
    return torch.Generator().manual_seed(seed)


def random_problem(out, inputs, *, dtype=torch.float64, seed=0, weight_rank=99, moment_rank=99, metric_rank=99):
    """Return weight, moment and metric; each of the rank asked for, or full."""
    draw = generator(seed)

    def randn(*shape):
        return torch.randn(*shape, dtype=dtype, generator=draw)

    middle = min(weight_rank, out, inputs)
    weight = randn(out, middle) @ randn(middle, inputs)
    samples, errors = randn(inputs, min(moment_rank, inputs)), randn(out, min(metric_rank, out))
    return weight, samples @ samples.mH, errors @ errors.mH


def factorise(weight, moment, metric, rank):
    return low_rank(weight, moment=moment, metric_root=sqrt_psd(metric), rank=rank)


def cost(error, moment, metric):
    """tr(metric · error · moment · errorᴴ), entry by entry."""
    total = 0.0
    for a in range(error.shape[0]):
        for b in range(error.shape[0]):
            for c in range(error.shape[1]):
                for d in range(error.shape[1]):
                    total += (metric[a, b] * error[b, c] * moment[c, d] * error[a, d].conj()).item()
    return complex(total).real


def least_cost(weight, moment, metric, rank):
    """The optimum by Eckart-Young: drop the trailing singular values of the whitened weight."""
    eigenvalues, eigenvectors = torch.linalg.eigh(metric)
    left = (eigenvectors * eigenvalues.clamp_min(0).sqrt()).mH
    eigenvalues, eigenvectors = torch.linalg.eigh(moment)
    right = eigenvectors * eigenvalues.clamp_min(0).sqrt()
    return torch.linalg.svdvals(left @ weight @ right)[rank:].square().sum().item()


problems = st.fixed_dictionaries(
    {
        "out": st.integers(1, 5),
        "inputs": st.integers(1, 6),
        "dtype": st.sampled_from(DTYPES),
        "seed": st.integers(0, 999),
        "weight_rank": st.integers(1, 6),
        "moment_rank": st.integers(1, 6),
        "metric_rank": st.integers(1, 6),
    }
)


@settings(max_examples=60, deadline=None)
@given(problems, st.integers(1, 7))
def test_the_error_is_the_energy_dropped_and_no_rank_does_better(problem, rank):
    weight, moment, metric = random_problem(**problem)
    factors = factorise(weight, moment, metric, rank)
    assert factors.up.shape == (problem["out"], rank)
    assert factors.down.shape == (rank, problem["inputs"])
    assert all(factor.isfinite().all() for factor in factors)
    whole = cost(weight, moment, metric)
    error = cost(weight - factors.up @ factors.down, moment, metric)
    assert abs(factors.dropped.item() - error) < 1e-12 * whole  # measured 2e-14
    assert abs(error - least_cost(weight, moment, metric, rank)) < 1e-12 * whole  # measured 2e-14


@pytest.mark.parametrize("dtype", DTYPES)
def test_random_competitors_lose(dtype):
    weight, moment, metric = random_problem(5, 7, dtype=dtype)
    factors = factorise(weight, moment, metric, 2)
    draw = generator(1)
    for _ in range(20):
        # Functionals at random with their own best regression, and the solution pushed a little.
        down = torch.randn(2, 7, dtype=dtype, generator=draw)
        up = weight @ moment @ down.mH @ torch.linalg.inv(down @ moment @ down.mH)
        assert cost(weight - up @ down, moment, metric) > factors.dropped.item() * 1.05
        pushed = [f + 1e-3 * torch.randn(f.shape, dtype=dtype, generator=draw) for f in (factors.up, factors.down)]
        assert cost(weight - pushed[0] @ pushed[1], moment, metric) > factors.dropped.item()


@pytest.mark.parametrize("dtype", DTYPES)
def test_more_rank_never_costs_more_and_all_of_it_is_the_identity(dtype):
    weight, moment, metric = random_problem(5, 7, dtype=dtype)
    dropped = [factorise(weight, moment, metric, rank).dropped.item() for rank in range(1, 6)]
    assert dropped == sorted(dropped, reverse=True)
    assert len(set(dropped)) == 5
    assert dropped[-1] < 1e-11 * cost(weight, moment, metric)


@settings(max_examples=40, deadline=None)
@given(out=st.integers(1, 8), inputs=st.integers(1, 8), dtype=st.sampled_from(DTYPES), seed=st.integers(0, 999))
def test_full_rank_is_the_identity(out, inputs, dtype, seed):
    # Directions that matter little are found less exactly; here all matter within a factor of ten or so.
    weight, moment, metric = random_problem(out, inputs, dtype=dtype, seed=seed)
    moment, metric = (m / m.diagonal().real.mean() + torch.eye(len(m)) for m in (moment, metric))
    for rank in (out, out + 2):
        factors = factorise(weight, moment, metric, rank)
        assert factors.dropped >= 0
        torch.testing.assert_close(factors.up @ factors.down, weight, rtol=0, atol=1e-10)  # measured 9e-12


def test_what_costs_nothing_is_still_predicted():
    # The metric sees only the first output; the second is four times the first and must come out right for free.
    weight = torch.tensor([[1.0, 2.0, -1.0], [4.0, 8.0, -4.0]], dtype=torch.float64)
    metric = torch.diag(torch.tensor([1.0, 0.0], dtype=torch.float64))
    _, moment, _ = random_problem(2, 3)
    factors = factorise(weight, moment, metric, 1)
    torch.testing.assert_close(factors.up @ factors.down, weight, rtol=0, atol=1e-12)


@pytest.mark.parametrize("dtype", DTYPES)
def test_up_is_the_regression_and_the_functionals_are_uncorrelated(dtype):
    weight, moment, metric = random_problem(5, 7, dtype=dtype, metric_rank=3)
    factors = factorise(weight, moment, metric, 3)
    correlation = factors.down @ moment @ factors.down.mH
    torch.testing.assert_close(correlation, torch.diag(correlation.diagonal()), rtol=0, atol=1e-10)
    remainder = weight - factors.up @ factors.down
    torch.testing.assert_close(
        remainder @ moment @ factors.down.mH, torch.zeros(5, 3, dtype=dtype), rtol=0, atol=1e-10
    )  # measured 3e-13


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("nothing", ["weight", "moment", "metric"])
def test_where_there_is_nothing_the_factors_are_zero(nothing, dtype):
    problem = dict(zip(("weight", "moment", "metric"), random_problem(4, 6, dtype=dtype), strict=True))
    problem[nothing] = torch.zeros_like(problem[nothing])
    factors = factorise(**problem, rank=3)
    assert all(torch.equal(factor, torch.zeros_like(factor)) for factor in factors)


@pytest.mark.parametrize("dtype", DTYPES)
def test_rank_beyond_the_problem_is_padded_with_zeros(dtype):
    weight, moment, metric = random_problem(3, 6, dtype=dtype, weight_rank=2)
    factors, padded = factorise(weight, moment, metric, 2), factorise(weight, moment, metric, 5)
    torch.testing.assert_close(padded.up[:, :2], factors.up, rtol=0, atol=0)
    torch.testing.assert_close(padded.down[:2], factors.down, rtol=0, atol=0)
    assert not padded.up[:, 2:].any()
    assert not padded.down[2:].any()


@pytest.mark.parametrize("scale", [1e-20, 1.0, 1e20])
def test_units_do_not_matter(scale):
    weight, moment, metric = random_problem(4, 6)
    product = (lambda factors: factors.up @ factors.down)(factorise(weight, moment, metric, 2))
    for scaled in ((weight, moment * scale, metric), (weight, moment, metric * scale)):
        factors = factorise(*scaled, 2)
        torch.testing.assert_close(factors.up @ factors.down, product, rtol=0, atol=1e-12)
    factors = factorise(weight * scale, moment, metric, 2)
    torch.testing.assert_close(factors.up @ factors.down / scale, product, rtol=0, atol=1e-12)


def test_the_same_input_gives_the_same_bytes_and_stays_as_it_was():
    problem = random_problem(5, 7, dtype=torch.complex128)
    before = [tensor.clone() for tensor in problem]
    first, second = factorise(*problem, 3), factorise(*problem, 3)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(problem, before, strict=True))


def test_pad_appends_zeros_and_never_cuts():
    matrix = torch.ones(2, 3)
    assert torch.equal(pad(matrix, 0, 4), torch.tensor([[1.0] * 3, [1.0] * 3, [0.0] * 3, [0.0] * 3]))
    assert torch.equal(pad(matrix, 1, 4), torch.tensor([[1.0, 1.0, 1.0, 0.0]] * 2))
    assert torch.equal(pad(matrix.expand(5, 2, 3), 1, 3)[:, 2], torch.zeros(5, 3))
    assert pad(matrix, 0, 2) is matrix
    assert pad(matrix, 0, 1) is matrix
