"""From errors to excess: the factor, how far off it is, and that weighing the keys puts what was measured in order."""

from __future__ import annotations

import math

import pytest

from transmla.convert import excess


def test_the_factor_is_the_mean_of_what_was_measured_and_the_rest_is_said():
    ratios = [
        0.212 / (0.0316**2 / 3.5 + 0.0190**2),
        0.277 / (0.0188**2 / 3.5 + 0.0275**2),
        0.112 / (0.0306**2 / 3.5 + 0.0073**2),
        0.088 / (0.0172**2 / 3.5 + 0.0120**2),
    ]
    assert excess.excess_factor() == pytest.approx(math.prod(ratios) ** (1 / 4))
    assert excess.predicted_excess(0.02) == pytest.approx(0.0004 * math.prod(ratios) ** (1 / 4))
    # Each size from the others: the last one is predicted by the first three.
    others = math.prod(ratios[:3]) ** (1 / 3)
    assert excess.miss(excess.MEASURED[3]) == pytest.approx(others / ratios[3] - 1)
    sentence = excess.how_far_off()
    misses = sorted(math.prod(ratios) ** (1 / 3) / ratio ** (4 / 3) - 1 for ratio in ratios)
    assert f"off by {misses[0]:+.0%} to {misses[-1]:+.0%}" in sentence
    assert "SmolLM2-135M-Instruct, 4 sizes, 0.088 to 0.28 nats" in sentence


def test_keys_at_par_would_take_the_worse_of_two_measured_splits():
    """Why keys are given less weight: at equal size the order of the predictions is the measured one."""
    by_size = {}
    for size in excess.MEASURED:
        by_size.setdefault(size.kv_lora_rank + size.qk_rope_head_dim, []).append(size)
    pairs = [pair for pair in by_size.values() if len(pair) == 2]
    assert len(pairs) == 2
    for first, second in pairs:
        assert (first.squared_error < second.squared_error) == (first.excess < second.excess)
    at_par = [
        (first.key_error**2 + first.value_error**2 < second.key_error**2 + second.value_error**2)
        == (first.excess < second.excess)
        for first, second in pairs
    ]
    assert at_par == [False, True]
