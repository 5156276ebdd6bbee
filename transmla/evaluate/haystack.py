"""Long context without a download: a needle in a haystack, and copying.

**Needle.** Sentences about nothing, somewhere among them one that gives a number, and at the end the question for it.
The model must say every token of the number. How deep the sentence lies, and how long the text is, are varied.

**Copy.** Random words, and then the same words again: from the second of them on, whoever looks back far enough knows
what comes. This is what induction heads do (Olsson et al., arXiv:2209.11895), and they live on exact positions.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy
import torch
from transformers import PreTrainedTokenizerBase

from transmla.data.tokens import check_known
from transmla.errors import UsageError
from transmla.evaluate.eval_report import ContextReport, ContextScore, Kind
from transmla.evaluate.passages import Passages
from transmla.evaluate.results import Arrays, Results
from transmla.evaluate.scores import score_tokens
from transmla.evaluate.subjects import Subject
from transmla.progress import Progress

_WHO = ("The baker", "A tired clerk", "My neighbour", "The old captain", "Her brother", "Some children", "The gardener")
_WHAT = ("looked at", "talked about", "walked past", "remembered", "painted", "asked for", "wrote down")
_WHICH = ("the grey river", "a broken clock", "the long street", "an empty house", "the first train", "a pair of shoes")
_WHEN = ("in the morning", "before dinner", "on a cold day", "after the rain", "last week", "without a word")
_PLACES = ("Lisbon", "Oslo", "Cairo", "Lima", "Hanoi", "Dublin", "Quito", "Riga", "Accra", "Sofia", "Tunis", "Perth")
_DIGITS = 6


@dataclass(frozen=True)
class Trial:
    """A text of ``length`` tokens whose last ``answer`` ones must be said."""

    tokens: tuple[int, ...]
    answer: int


def needle_trial(
    tokenizer: PreTrainedTokenizerBase, *, length: int, depth: float, seed: int, start: Sequence[int] = ()
) -> Trial:
    """Hide a number in a text.

    Args:
        tokenizer: of the models.
        length: tokens of the text, with question and answer.
        depth: where it is hidden: 0 at the start, 1 just before the question.
        seed: of sentences, place and number.
        start: tokens that a text begins with.

    Raises:
        UsageError: there is no room for sentences.
    """
    chance = random.Random(f"needle {seed}")
    place, number = chance.choice(_PLACES), "".join(chance.choice("123456789") for _ in range(_DIGITS))
    # Digits stand apart, so that every tokenizer has several tokens to say, and not one that is rare.
    spelled = " ".join(number)

    def encode(text: str) -> list[int]:
        return tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]

    needle = encode(f" The secret number of {place} is {spelled}.")
    question = encode(f" What is the secret number of {place}? The secret number of {place} is")
    answer = encode(f" {spelled}")
    room = length - len(start) - len(needle) - len(question) - len(answer)
    if room < len(needle):
        raise UsageError(f"A context of {length} tokens has no room for a needle and a haystack: raise --contexts.")
    hay: list[int] = []
    borders = [0]
    while len(hay) < room:
        words = (chance.choice(words) for words in (_WHO, _WHAT, _WHICH, _WHEN))
        hay += encode(f" {' '.join(words)}.")
        borders.append(min(len(hay), room))
    # Between two sentences, but for the last one, which is cut where the room ends.
    hidden = min(borders[:-1], key=lambda border: abs(border - depth * room))
    tokens = [*start, *hay[:hidden], *needle, *hay[hidden:room], *question, *answer]
    return Trial(tuple(tokens), len(answer))


def copy_trial(words: Sequence[int], *, length: int, seed: int, start: Sequence[int] = ()) -> Trial:
    """Say random words twice, after what a text begins with; all of the second time but its first must be said."""
    chance = random.Random(f"copy {seed}")
    half = [chance.choice(words) for _ in range((length - len(start)) // 2)]
    if len(half) < 2:
        raise UsageError(f"A context of {length} tokens has no room for two words, twice: raise --contexts.")
    return Trial((*start, *half, *half), len(half) - 1)


def whole_words(tokenizer: PreTrainedTokenizerBase, *, vocab_size: int) -> list[int]:
    """Return the tokens that are a word of letters with a space before it, or where there are few, all plain ones.

    A tokenizer may have more tokens than the model has rows for.
    """
    texts = tokenizer.batch_decode(
        [[token] for token in range(min(len(tokenizer), vocab_size))], skip_special_tokens=True
    )
    words = [token for token, text in enumerate(texts) if text[:1] == " " and text[1:].isascii() and text[1:].isalpha()]
    plain = [token for token, text in enumerate(texts) if text.strip()]
    return words if len(words) >= 100 else plain


class ContextPart:
    """Needles and copies at several lengths, for all models."""

    field = "contexts"

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        *,
        results: Results,
        vocab_size: int,
        lengths: Sequence[int],
        num_depths: int,
        num_trials: int,
        batch_size: int,
        start: Sequence[int] = (),
    ) -> None:
        """Write all texts.

        Args:
            tokenizer: of the models.
            results: where what is known lies.
            vocab_size: of the models.
            lengths: tokens of the texts.
            num_depths: depths at which needles are hidden, evenly from start to end.
            num_trials: texts of each kind.
            batch_size: texts at once.
            start: tokens that each text begins with.
        """
        self._results, self._batch_size = results, batch_size
        depths = [number / max(1, num_depths - 1) for number in range(num_depths)]
        words, seeds = whole_words(tokenizer, vocab_size=vocab_size), range(num_trials)
        self._cells: dict[tuple[Kind, int, float | None], list[Trial]] = {}
        for length in lengths:
            for depth in depths:
                self._cells["needle", length, depth] = [
                    needle_trial(tokenizer, length=length, depth=depth, seed=seed, start=start) for seed in seeds
                ]
            self._cells["copy", length, None] = [
                copy_trial(words, length=length, seed=seed, start=start) for seed in seeds
            ]
        for trials in self._cells.values():
            check_known(torch.tensor([trial.tokens for trial in trials]), vocab_size=vocab_size)
        self._found: list[tuple[str, list[Arrays]]] = []

    def measure(self, subject: Subject, progress: Progress) -> None:
        """Have a model read all texts."""
        with progress.task(f"{subject.name} looks back", sum(map(len, self._cells.values()))) as advance:
            found = []
            for trials in self._cells.values():
                passages = Passages(
                    tuple(torch.tensor(trial.tokens) for trial in trials),
                    tuple(len(trial.tokens) - trial.answer for trial in trials),
                    tokens_per_byte=1.0,
                )

                def read(passages: Passages = passages) -> Arrays:
                    return score_tokens(subject.model, passages, batch_size=self._batch_size)

                found.append(self._results.arrays({"what": "text", **subject.key, **passages.settings}, read))
                advance(len(trials))
        self._found.append((subject.name, found))

    def report(self) -> Iterator[ContextReport]:
        """Put everything together."""
        for number, ((kind, length, depth), trials) in enumerate(self._cells.items()):
            ends = numpy.cumsum([trial.answer for trial in trials])
            yield ContextReport(
                kind=kind,
                length=length,
                depth=depth,
                num_trials=len(trials),
                scores=tuple(_score(name, cells[number], ends) for name, cells in self._found),
            )


def _score(name: str, scores: Arrays, ends: numpy.ndarray) -> ContextScore:
    answers = numpy.split(scores["right"], ends[:-1])
    return ContextScore(
        model=name,
        token_accuracy=float(scores["right"].mean()),
        exact=float(numpy.mean([answer.all() for answer in answers])),
        nll=float(scores["nll"].mean(dtype=numpy.float64)),
    )
