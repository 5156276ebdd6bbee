"""Sequences of repeats among those that are learnt: without them training takes away what is left of copying.

Distillation alone weakens the heads that copy (docs/concepts/algorithm.md, "Repeats"). In a sequence of repeats
everything is said twice, and only the second time is to be learnt: what comes then can be known.
"""

from __future__ import annotations

import math
import random
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from transmla.data.repeats import passages, random_words, repeat_window
from transmla.finetune.data.packing import Row


class RepeatRows:
    """Makes a sequence of repeats for every so many others: random words and a passage of theirs by turns."""

    def __init__(self, words: Sequence[int], *, share: float, start: Sequence[int], seed: str) -> None:
        """Take what to say.

        Args:
            words: tokens of whole words.
            share: sequences of repeats for each other one.
            start: tokens that a text begins with.
            seed: of words, passages and lengths.
        """
        self._words, self._share, self._start, self._seed = words, share, start, seed

    def seeded(self, number: int) -> RepeatRows:
        """Return what says other words and passages, for another data set."""
        return RepeatRows(self._words, share=self._share, start=self._start, seed=f"{self._seed} {number}")

    def among(self, rows: Iterable[Row], *, last: bool) -> Iterator[Row]:
        """Yield the rows, and the repeats: each as soon as it is due, or all of them in the end.

        The same rows give the same repeats each time.
        """
        chance, kept, number = random.Random(f"repeats {self._seed}"), [], 0
        for count, row in enumerate(rows, start=1):
            yield row
            # A tenth of ten is one, whatever ten tenths add up to.
            while number < math.floor(self._share * count + 1e-9):
                repeat = self._make(row, chance, passage=number % 2 == 1)
                number += 1
                if last:
                    kept.append(repeat)
                else:
                    yield repeat
        yield from kept

    def of(self, rows: Sequence[Row]) -> list[Row]:
        """Return the repeats alone, at least one."""
        found = list(self.among(rows, last=True))[len(rows) :]
        return found or [self._make(rows[-1], random.Random(f"repeats {self._seed}"), passage=False)]

    def _make(self, row: Row, chance: random.Random, *, passage: bool) -> Row:
        # What comes after the last token to be learnt may be padding.
        text = row.tokens[: max((place for place, counts in enumerate(row.loss_mask) if counts), default=0) + 1]
        text = text[len(self._start) :] or text
        piece = passages(text, chance) if passage else random_words(self._words, chance)
        made = repeat_window(piece, window=len(row.tokens), chance=chance, start=self._start)
        beginnings = [place == 0 for place in range(len(made.tokens))]
        return Row(made.tokens, beginnings, made.again, splittable=False)


@dataclass(frozen=True)
class Interleaved:
    """A stream that can be read from its start as often as one likes, with repeats among its rows."""

    source: Iterable[Row]
    repeats: RepeatRows

    def __iter__(self) -> Iterator[Row]:
        return self.repeats.among(self.source, last=False)
