"""The windows that a conversion reads: natural ones of the user's text, and repeats made of them.

Natural text of a size that is cheap to read holds a few thousand of a vocabulary's token types, and says little twice.
What is fitted on it alone loses the values of all other tokens, and with them copying: quoting, code completion,
look-ups (docs/concepts/algorithm.md, "Repeats"). So windows are *added* in which everything is said twice, half of them
random words of the whole vocabulary, half passages of the natural windows.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import NamedTuple

import torch
from jaxtyping import Int
from torch import Tensor

from transmla.data.repeats import passages, random_words, repeat_window


class WindowCounts(NamedTuple):
    """How many windows there are of each kind; those to fit on come first, then those held out.

    Attributes:
        natural: windows of the text to fit on.
        repeats: windows of repeats to fit on.
        heldout_natural: windows of the text to judge by.
        heldout_repeats: windows of repeats to judge by.
    """

    natural: int
    repeats: int
    heldout_natural: int
    heldout_repeats: int

    @classmethod
    def of(cls, natural: int, heldout: int, *, repeats: float) -> WindowCounts:
        """Add repeats as a share of the natural windows, to both; one at least, if there are to be any."""
        fit, judges = (max(1, round(repeats * count)) if repeats else 0 for count in (natural, heldout))
        return cls(natural, fit, heldout, judges)

    @property
    def num_fit(self) -> int:
        """Windows to fit on."""
        return self.natural + self.repeats

    @property
    def num_heldout(self) -> int:
        """Windows to judge by."""
        return self.heldout_natural + self.heldout_repeats

    @property
    def fit(self) -> slice:
        """Rows of the windows to fit on."""
        return slice(0, self.num_fit)

    @property
    def heldout(self) -> slice:
        """Rows of the windows to judge by."""
        return slice(self.num_fit, None)


def add_repeats(
    natural: Int[Tensor, "windows tokens"],
    counts: WindowCounts,
    *,
    words: Sequence[int],
    seed: int,
    start: Sequence[int] = (),
) -> Int[Tensor, "more tokens"]:
    """Return the natural windows and the repeats, each part in random order, so that its first rows hold both kinds.

    Without repeats the natural windows come back as they are.

    Args:
        natural: windows to fit on, then those held out; each part's passages are taken from its own windows.
        counts: how many there are to be.
        words: tokens of whole words.
        seed: of words, lengths, passages and order.
        start: tokens that each window begins with.
    """
    parts = []
    for part, rows, count in (
        ("fit", natural[: counts.natural], counts.repeats),
        ("heldout", natural[counts.natural :], counts.heldout_repeats),
    ):
        if count:
            made = repeat_windows(rows, count, words=words, seed=f"{seed} {part}", start=start)
            rows = torch.cat([rows, made])
            rows = rows[torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed))]
        parts.append(rows)
    return torch.cat(parts)


def repeat_windows(
    natural: Int[Tensor, "windows tokens"],
    count: int,
    *,
    words: Sequence[int],
    seed: str,
    start: Sequence[int] = (),
) -> Int[Tensor, "count tokens"]:
    """Write windows in which everything is said twice: random words in every other one, passages in the rest."""
    chance = random.Random(f"repeats {seed}")

    def passage(length: int) -> Sequence[int]:
        window = natural[chance.randrange(len(natural)), len(start) :]
        return passages(window.tolist(), chance)(length)

    pieces = (random_words(words, chance), passage)
    windows = [
        repeat_window(pieces[number % 2], window=natural.shape[1], chance=chance, start=start).tokens
        for number in range(count)
    ]
    return torch.tensor(windows, dtype=torch.int64)
