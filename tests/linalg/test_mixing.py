"""The split into rotary slots against sums over keys, queries and distances that share nothing with it."""

import cmath
import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from transmla.linalg.mixing import RotarySplit, identity_split, mix_heads, rotation_error

KV_HEADS, PAIRS, HEADS, DISTANCES = 2, 4, 6, 5
FREQUENCIES = torch.tensor([1.0, 0.6, 0.2, 0.05], dtype=torch.float64)


def randn(*shape, dtype=torch.complex128, seed=0):
    return torch.randn(*shape, dtype=dtype, generator=torch.Generator().manual_seed(seed))


def random_covariance(*, samples=32, dtype=torch.complex128, seed=0):
    """E[z zᴴ] of keys whose pairs and heads are correlated."""
    keys = randn(samples, KV_HEADS * PAIRS, dtype=dtype, seed=seed)
    keys = keys @ randn(KV_HEADS * PAIRS, KV_HEADS * PAIRS, dtype=dtype, seed=seed + 1)
    return ((keys.mT @ keys.conj()) / samples).reshape(KV_HEADS, PAIRS, KV_HEADS, PAIRS).to(torch.complex128)


def random_metric(*, seed=0):
    queries = randn(KV_HEADS, PAIRS, 16, seed=seed)
    return queries @ queries.mH


def random_distances(*, seed=0):
    weights = randn(HEADS, DISTANCES, dtype=torch.float64, seed=seed).square()
    return weights / weights.sum(-1, keepdim=True)


def plain_metric():
    return torch.eye(PAIRS, dtype=torch.complex128).expand(KV_HEADS, PAIRS, PAIRS)


def project(split: RotarySplit) -> torch.Tensor:
    """up @ down, on the stacked pairs of all heads."""
    return split.up.flatten(0, 1) @ split.down.flatten(1)


def slots_of(num_slots, fold):
    """Frequencies of the slots: as many of each of a group's as the slots allow, in turn."""
    share = num_slots * fold // PAIRS
    return torch.stack([FREQUENCIES[group * fold + s % fold] for group in range(PAIRS // fold) for s in range(share)])


@settings(max_examples=20, deadline=None)
@given(fold=st.sampled_from([1, 2, 4]), seed=st.integers(0, 99))
def test_with_every_slot_nothing_remains(fold, seed):
    split = mix_heads(
        random_covariance(seed=seed), metric=random_metric(seed=seed), num_slots=KV_HEADS * PAIRS, fold=fold
    )
    everything = torch.eye(KV_HEADS * PAIRS, dtype=torch.complex128)
    torch.testing.assert_close(project(split), everything, rtol=0, atol=1e-10)  # measured 4e-12


@pytest.mark.parametrize("num_slots", [4, 8])
def test_mixing_at_one_frequency_commutes_with_the_rotation(num_slots):
    """Slots and remainder, each turned as the source turns it, give the source's logits at every distance."""
    split = mix_heads(random_covariance(), metric=random_metric(), num_slots=num_slots, fold=1)
    slot_frequencies = slots_of(num_slots, 1).tolist()
    key, query = randn(KV_HEADS, PAIRS, seed=1), randn(KV_HEADS, PAIRS, seed=2)
    slots = [(split.down[s] * key).sum().item() for s in range(num_slots)]
    for g in range(KV_HEADS):
        for delta in range(-3, 9):
            source = converted = 0.0
            for pair, theta in enumerate(FREQUENCIES.tolist()):
                turn = cmath.exp(1j * theta * delta)
                source += (query[g, pair].item() * key[g, pair].item().conjugate() * turn).real
                given_back = sum(split.up[g, pair, s].item() * slots[s] for s in range(num_slots))
                remainder = key[g, pair].item() - given_back
                converted += (query[g, pair].item() * remainder.conjugate() * turn).real
            for s, phi in enumerate(slot_frequencies):
                slot_query = sum(
                    split.up[g, pair, s].item().conjugate() * query[g, pair].item() for pair in range(PAIRS)
                )
                converted += (slot_query * slots[s].conjugate() * cmath.exp(1j * phi * delta)).real
            assert abs(source - converted) < 1e-12


@pytest.mark.parametrize(("num_slots", "fold"), [(4, 1), (2, 2), (1, 4), (3, 4), (6, 2)])
def test_what_remains_of_a_group_is_uncorrelated_with_its_slots(num_slots, fold):
    covariance = random_covariance()
    split = mix_heads(covariance, metric=random_metric(), num_slots=num_slots, fold=fold)
    share = num_slots * fold // PAIRS
    for group in range(PAIRS // fold):
        pair, slot = slice(group * fold, (group + 1) * fold), slice(group * share, (group + 1) * share)
        keys = covariance[:, pair, :, pair].reshape(KV_HEADS * fold, -1)
        up, down = split.up[:, pair, slot].reshape(-1, share), split.down[slot, :, pair].reshape(share, -1)
        correlation = (torch.eye(len(keys)) - up @ down) @ keys @ down.mH
        torch.testing.assert_close(correlation, torch.zeros_like(correlation), rtol=0, atol=1e-10)


@pytest.mark.parametrize("fold", [1, 2, 4])
def test_a_slot_touches_its_own_group_only(fold):
    split = mix_heads(random_covariance(), metric=random_metric(), num_slots=4, fold=fold)
    for s in range(4):
        group = s // fold
        for pair in range(PAIRS):
            assert split.down[s, :, pair].any() == (pair // fold == group)
            assert split.up[:, pair, s].any() == (pair // fold == group)


@pytest.mark.parametrize("num_slots", [1, 3, 6])
def test_no_slots_of_one_group_keep_more_of_the_logits(num_slots):
    """Without rotation the logits are a matrix, queries by keys, and its trailing singular values the least loss."""
    keys, queries = randn(20, KV_HEADS * PAIRS, seed=1), randn(KV_HEADS, 9, PAIRS, seed=2)
    split = mix_heads(
        (keys.mT @ keys.conj()).reshape(KV_HEADS, PAIRS, KV_HEADS, PAIRS),
        metric=queries.mT @ queries.conj(),
        num_slots=num_slots,
        fold=PAIRS,
    )
    logits = torch.block_diag(*queries) @ keys.mH
    lost = torch.block_diag(*queries) @ (keys - keys @ project(split).mT).mH
    least = torch.linalg.svdvals(logits)[num_slots:].square().sum()
    assert abs(lost.abs().square().sum() - least) < 1e-12 * logits.abs().square().sum()  # measured 1e-15


@pytest.mark.parametrize("fold", [1, 2, 4])
def test_real_keys_are_split_as_rorope_does(fold):
    """A real covariance and no metric: the real principal components of each group, by another library."""
    covariance = random_covariance(dtype=torch.float64)
    split = mix_heads(covariance, metric=plain_metric(), num_slots=4, fold=fold)
    assert not split.down.imag.any()
    assert not split.up.imag.any()
    for group in range(PAIRS // fold):
        pair, slot = slice(group * fold, (group + 1) * fold), slice(group * fold, (group + 1) * fold)
        keys = covariance.real[:, pair, :, pair].reshape(KV_HEADS * fold, -1).numpy()
        components = np.linalg.svd(keys)[0][:, :fold]
        projector = split.up[:, pair, slot].reshape(-1, fold) @ split.down[slot, :, pair].reshape(fold, -1)
        np.testing.assert_allclose(projector.real.numpy(), components @ components.T, rtol=0, atol=1e-10)


def test_slots_that_cannot_be_shared_out_are_refused():
    with pytest.raises(AssertionError, match="3 slots cannot be shared out among groups of 2 of 4 pairs"):
        mix_heads(random_covariance(), metric=random_metric(), num_slots=3, fold=2)


def test_the_identity_split_gives_every_pair_a_slot():
    split = identity_split(KV_HEADS, PAIRS, like=randn(1))
    key = randn(KV_HEADS, PAIRS)
    slots = torch.einsum("sgl,gl->s", split.down, key)
    assert torch.equal(slots, key.flatten())
    assert torch.equal(torch.einsum("gls,s->gl", split.up, slots), key)


def enumerated_error(split, keys, queries, distances, slot_frequencies):
    """The squared logit error, averaged over every query, key and distance there is, in plain arithmetic.

    Queries and keys also take four phases each, as absolute positions would turn them.
    """
    total = 0.0
    num_slots = len(slot_frequencies)
    average = [
        [
            sum(distances[h, delta].item() * cmath.exp(1j * theta * delta) for delta in range(DISTANCES))
            for theta in FREQUENCIES.tolist()
        ]
        for h in range(HEADS)
    ]
    for key in keys:
        slots = [(split.down[s] * key).sum().item() for s in range(num_slots)]
        for h, delta in itertools.product(range(HEADS), range(DISTANCES)):
            g = h // (HEADS // KV_HEADS)
            # The error is Re Σ_l q_l · conj(wrong_l).
            wrong = []
            for pair, theta in enumerate(FREQUENCIES.tolist()):
                given_back = [split.up[g, pair, s].item() * slots[s] for s in range(num_slots)]
                remainder = key[g, pair].item() - sum(given_back)
                turn = cmath.exp(1j * theta * delta)
                error = remainder.conjugate() * (turn - average[h][pair])
                for s, phi in enumerate(slot_frequencies):
                    error += given_back[s].conjugate() * (turn - cmath.exp(1j * phi * delta))
                wrong.append(error)
            for query, phase in itertools.product(queries[h], (1, 1j, -1, -1j)):
                error = sum(phase * q * w for q, w in zip(query.tolist(), wrong, strict=True)).real
                total += distances[h, delta].item() * error**2 / (4 * len(keys) * len(queries[h]))
    return total


@pytest.mark.parametrize(("num_slots", "fold"), [(4, 1), (2, 2), (1, 4), (3, 4), (6, 2), (8, 4)])
def test_the_predicted_error_is_the_enumerated_one(num_slots, fold):
    keys = randn(5, KV_HEADS, PAIRS, seed=3)
    queries = randn(HEADS, 3, PAIRS, seed=4)
    covariance = torch.einsum("nal,nbm->albm", keys, keys.conj()) / len(keys)
    query_moment = torch.einsum("hnl,hnm->hlm", queries, queries.conj()) / queries.shape[1]
    distances, slot_frequencies = random_distances(), slots_of(num_slots, fold) * 1.1
    split = mix_heads(covariance, metric=random_metric(), num_slots=num_slots, fold=fold)
    predicted = rotation_error(
        split,
        covariance,
        query_moment,
        distances=distances,
        pair_frequencies=FREQUENCIES,
        slot_frequencies=slot_frequencies,
    )
    expected = enumerated_error(split, keys, queries, distances, slot_frequencies.tolist())
    assert abs(predicted.item() - expected) < 1e-12 * expected  # measured 5e-15


def predict(split, *, distances=None, slot_frequencies=FREQUENCIES, pair_frequencies=FREQUENCIES):
    queries = randn(HEADS, 3, PAIRS, seed=4)
    return rotation_error(
        split,
        random_covariance(),
        queries.mT @ queries.conj(),
        distances=random_distances() if distances is None else distances,
        pair_frequencies=pair_frequencies,
        slot_frequencies=slot_frequencies,
    ).item()


def test_no_error_where_every_key_turns_as_in_the_source():
    split = mix_heads(random_covariance(), metric=random_metric(), num_slots=4, fold=1)
    identity = identity_split(KV_HEADS, PAIRS, like=split.up)
    # The sizes that cancel are about 500.
    assert predict(split) > 10
    assert predict(identity, slot_frequencies=FREQUENCIES.repeat(KV_HEADS)) < 1e-11  # measured 3e-14
    # A remainder at one distance only turns by exactly its average, and at none at all nothing turns.
    far = torch.eye(DISTANCES, dtype=torch.float64)[-1].expand(HEADS, -1)
    assert predict(split, distances=far) < 1e-11  # measured 3e-14
    here = torch.eye(DISTANCES, dtype=torch.float64)[0].expand(HEADS, -1)
    assert predict(split, distances=here, slot_frequencies=FREQUENCIES + 1) < 1e-11  # measured 3e-14
    still = torch.zeros_like(FREQUENCIES)
    assert predict(split, pair_frequencies=still, slot_frequencies=still) < 1e-11  # measured 3e-14


def test_more_slots_at_their_own_frequencies_leave_less_error():
    errors = []
    for num_slots in (4, 8):
        split = mix_heads(random_covariance(), metric=random_metric(), num_slots=num_slots, fold=1)
        errors.append(predict(split, slot_frequencies=slots_of(num_slots, 1)))
    assert errors[0] > 10
    assert errors[1] < 1e-11  # measured 3e-14


def test_the_prediction_is_a_sum_over_heads_of_their_weights():
    split = mix_heads(random_covariance(), metric=random_metric(), num_slots=4, fold=1)
    queries, weights = randn(HEADS, 3, PAIRS, seed=4), torch.arange(1.0, HEADS + 1, dtype=torch.float64)
    moments = queries.mT @ queries.conj()

    def error(moment):
        return rotation_error(
            split,
            random_covariance(),
            moment,
            distances=random_distances(),
            pair_frequencies=FREQUENCIES,
            slot_frequencies=FREQUENCIES,
        ).item()

    alone = [error(moments * (torch.arange(HEADS) == h)[:, None, None]) for h in range(HEADS)]
    weighted = error(moments * weights[:, None, None])
    assert weighted == pytest.approx(sum(w * e for w, e in zip(weights.tolist(), alone, strict=True)), rel=1e-12)
