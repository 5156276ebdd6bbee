"""Windows of repeats: everything in them is said twice, and natural windows stay what they are."""

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from transmla.calibration.windows import WindowCounts, add_repeats, repeat_windows

WORDS = range(1000, 2000)


def natural(count, size):
    """Windows in which each token stands once."""
    return torch.arange(count * size).view(count, size) % 1000


def pieces(window):
    """Take a window apart into what is said twice; the last piece may be cut off."""
    found, tokens = [], list(window)
    while tokens:
        length = next((n for n in range(1, len(tokens) // 2 + 1) if tokens[:n] == tokens[n : 2 * n]), None)
        if length is None:
            # Cut off: as much of it as is said a second time is the same.
            found.append(tokens)
            break
        found.append(tokens[:length])
        tokens = tokens[2 * length :]
    return found


@pytest.mark.parametrize("start", [(), (7,)])
def test_everything_is_said_twice_at_several_periods(start):
    rows = natural(5, 64)
    windows = repeat_windows(rows, 12, words=WORDS, seed="1", start=start)
    assert windows.shape == (12, 64)
    lengths = []
    for number, window in enumerate(windows.tolist()):
        assert window[: len(start)] == list(start)
        *whole, _ = pieces(window[len(start) :])
        lengths += map(len, whole)
        for piece in whole:
            if number % 2:
                # A passage: neighbors in the text, and none that a window begins with.
                assert all(after - before == 1 for before, after in itertools.pairwise(piece))
                assert piece[0] % 64 >= len(start)
            else:
                assert set(piece) <= set(WORDS)
    assert 8 <= min(lengths) < max(lengths) <= 32
    assert len(set(lengths)) > 5


@given(
    st.integers(1, 9),
    st.integers(1, 5),
    st.floats(0, 2),
    st.integers(8, 40),
    st.integers(0, 9),
    st.sampled_from([(), (3,)]),
)
def test_natural_windows_stay_and_repeats_are_added(fit, heldout, share, size, seed, start):
    counts = WindowCounts.of(fit, heldout, repeats=share)
    rows = natural(fit + heldout, size)
    windows = add_repeats(rows, counts, words=WORDS, seed=seed, start=start)
    assert len(windows) == counts.num_fit + counts.num_heldout
    assert counts.num_fit == fit + (max(1, round(share * fit)) if share else 0)
    for part, own in ((counts.fit, rows[:fit]), (counts.heldout, rows[fit:])):
        found = windows[part].tolist()
        assert all(window in found for window in own.tolist())
    if not share:
        assert torch.equal(windows, rows)
    assert torch.equal(windows, add_repeats(rows, counts, words=WORDS, seed=seed, start=start))


def test_what_is_held_out_is_in_no_window_to_fit_on():
    counts = WindowCounts.of(6, 6, repeats=1.0)
    rows = natural(12, 64)
    windows = add_repeats(rows, counts, words=WORDS, seed=0)
    fit, heldout = (set(windows[part].flatten().tolist()) - set(WORDS) for part in (counts.fit, counts.heldout))
    assert fit == set(rows[:6].flatten().tolist())
    assert not fit & heldout


def test_the_first_rows_hold_both_kinds():
    """Those judge training, and predict sizes."""
    counts = WindowCounts.of(128, 8, repeats=0.33)
    windows = add_repeats(natural(136, 256), counts, words=range(50_000, 60_000), seed=0)
    made = (windows >= 50_000).any(1)
    assert 0 < made[:16].sum() < 8
    assert made[counts.fit].sum() == 21


@pytest.mark.parametrize("share", [0.0, 0.33])
def test_another_seed_gives_other_repeats(share):
    counts = WindowCounts.of(8, 2, repeats=share)
    one, other = (add_repeats(natural(10, 64), counts, words=WORDS, seed=seed) for seed in (0, 1))
    assert torch.equal(one, other) == (share == 0)
