"""Windows in which everything is said twice: what keeps a model copying while it is fitted or trained.

A window is filled with pieces of random length, an eighth to half of it, each followed by itself. The pieces are random
words, or passages of a text. See docs/concepts/algorithm.md, "Repeats". What an evaluation has models copy
(:mod:`transmla.data.synthetic`) is drawn from other seeds.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from typing import NamedTuple

# Lengths of what is said twice, as shares of a window.
_SHORTEST, _LONGEST = 1 / 8, 1 / 2


class RepeatWindow(NamedTuple):
    """A window of repeats.

    Attributes:
        tokens: all of them.
        again: whether a token has been said before, in the first half of its piece.
    """

    tokens: list[int]
    again: list[bool]


def repeat_window(
    piece: Callable[[int], Sequence[int]], *, window: int, chance: random.Random, start: Sequence[int] = ()
) -> RepeatWindow:
    """Fill a window after ``start``; what does not fit of the last piece is cut off.

    Args:
        piece: returns so many tokens, or fewer where there are none, but at least one.
        window: tokens of the window.
        chance: draws the lengths.
        start: tokens that the window begins with.
    """
    tokens, again = list(start), [False] * len(start)
    while len(tokens) < window:
        said = piece(chance.randint(max(1, round(_SHORTEST * window)), max(1, round(_LONGEST * window))))
        tokens += [*said, *said]
        again += [False] * len(said) + [True] * len(said)
    return RepeatWindow(tokens[:window], again[:window])


def random_words(words: Sequence[int], chance: random.Random) -> Callable[[int], list[int]]:
    """Return what draws so many words."""
    return lambda length: [chance.choice(words) for _ in range(length)]


def passages(text: Sequence[int], chance: random.Random) -> Callable[[int], Sequence[int]]:
    """Return what draws neighboring tokens of ``text``, which has at least one."""

    def passage(length: int) -> Sequence[int]:
        place = chance.randint(0, max(0, len(text) - length))
        return text[place : place + length]

    return passage
