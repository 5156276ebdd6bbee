import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from transmla.linalg.hermitian import clamp_psd, leading_eigenvectors, sqrt_psd

DTYPES = (torch.float64, torch.complex128)
problems = settings(max_examples=40, deadline=None)


def random_psd(size, *, rank=None, dtype=torch.float64, seed=0):
    factor = torch.randn(size, rank or size, dtype=dtype, generator=torch.Generator().manual_seed(seed))
    return factor @ factor.mH


@problems
@given(
    size=st.integers(1, 7),
    rank=st.integers(1, 7),
    scale=st.sampled_from([1e-12, 1.0, 1e12]),
    dtype=st.sampled_from(DTYPES),
    seed=st.integers(0, 99),
)
def test_the_root_squared_is_the_matrix(size, rank, scale, dtype, seed):
    matrix = random_psd(size, rank=rank, dtype=dtype, seed=seed) * scale
    root = sqrt_psd(matrix)
    torch.testing.assert_close(root, root.mH, rtol=0, atol=1e-12 * scale**0.5)  # measured 3e-15
    torch.testing.assert_close(root @ root, matrix, rtol=0, atol=1e-12 * scale)  # measured 5e-14
    assert torch.linalg.eigvalsh(root).min() > -1e-12 * scale**0.5


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_batch_of_roots_is_the_roots_of_the_batch(dtype):
    matrices = [random_psd(5, dtype=dtype, seed=seed) for seed in range(3)]
    together = sqrt_psd(torch.stack(matrices))
    torch.testing.assert_close(together, torch.stack([sqrt_psd(m) for m in matrices]), rtol=0, atol=1e-12)


def test_eigenvalues_below_zero_count_as_zero():
    vectors = torch.linalg.qr(random_psd(3)).Q
    matrix = (vectors * torch.tensor([4.0, 1.0, -0.5])) @ vectors.mT
    expected = (vectors * torch.tensor([2.0, 1.0, 0.0])) @ vectors.mT
    torch.testing.assert_close(sqrt_psd(matrix), expected, rtol=0, atol=1e-12)


def test_a_matrix_is_clamped_where_it_has_eigenvalues_below_zero():
    vectors = torch.linalg.qr(random_psd(3)).Q
    definite = random_psd(3)
    indefinite = (vectors * torch.tensor([4.0, 1.0, -0.5])) @ vectors.mT
    nearest = (vectors * torch.tensor([4.0, 1.0, 0.0])) @ vectors.mT
    assert torch.equal(clamp_psd(definite), definite)
    clamped = clamp_psd(torch.stack([definite, indefinite]))
    torch.testing.assert_close(clamped, torch.stack([definite, nearest]), rtol=0, atol=1e-12)


@problems
@given(
    size=st.integers(1, 7),
    rank=st.integers(1, 7),
    dtype=st.sampled_from(DTYPES),
    seed=st.integers(0, 99),
)
def test_eigenvectors_are_the_leading_ones(size, rank, dtype, seed):
    rank = min(size, rank)
    matrix = random_psd(size, dtype=dtype, seed=seed)
    values, vectors = leading_eigenvectors(matrix, rank)
    assert vectors.shape == (size, rank)
    assert (values.diff() <= 0).all()
    torch.testing.assert_close(matrix @ vectors, vectors * values, rtol=0, atol=1e-11)  # measured 5e-14
    torch.testing.assert_close(vectors.mH @ vectors, torch.eye(rank, dtype=dtype), rtol=0, atol=1e-12)
    # What they leave is nowhere larger than the smallest of them.
    rest = matrix - (vectors * values) @ vectors.mH
    assert torch.linalg.matrix_norm(rest, 2) <= values[-1] + 1e-11


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_largest_entry_of_an_eigenvector_is_real_and_positive(dtype):
    for seed in range(20):
        _, vectors = leading_eigenvectors(random_psd(6, dtype=dtype, seed=seed), 6)
        peaks = vectors.gather(0, vectors.abs().argmax(dim=0, keepdim=True))
        torch.testing.assert_close(peaks, peaks.abs().to(dtype), rtol=0, atol=1e-15)


def test_a_change_of_the_library_s_phases_changes_nothing(monkeypatch):
    matrix = random_psd(6, dtype=torch.complex128)
    expected = leading_eigenvectors(matrix, 4)
    eigh = torch.linalg.eigh

    def other_phases(matrix):
        values, vectors = eigh(matrix)
        return values, vectors * torch.polar(torch.ones_like(values), torch.arange(len(values)).to(values))

    monkeypatch.setattr(torch.linalg, "eigh", other_phases)
    values, vectors = leading_eigenvectors(matrix, 4)
    assert torch.equal(values, expected[0])
    torch.testing.assert_close(vectors, expected[1], rtol=0, atol=1e-14)


def test_rounding_never_gives_a_negative_eigenvalue():
    for seed in range(20):
        values, _ = leading_eigenvectors(random_psd(8, rank=2, seed=seed), 8)
        assert values.min() >= 0
        assert values[1] > 1e-3
        assert values[2:].max() < 1e-12
