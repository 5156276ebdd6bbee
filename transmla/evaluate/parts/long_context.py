"""Long context without a download: a needle in a haystack, and copying.

**Needle.** Sentences about nothing, somewhere among them one that gives a number, and at the end the question for it.
The model must say every token of the number. How deep the sentence lies, and how long the text is, are varied.

**Copy.** Random words, and then the same words again: from the second of them on, whoever looks back far enough knows
what comes. This is what induction heads do (Olsson et al., arXiv:2209.11895), and they live on exact positions.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy
import torch
from transformers import PreTrainedTokenizerBase

from transmla.data.synthetic import RecallPrompt, copy_prompt, needle_prompt, whole_words
from transmla.data.tokens import check_known
from transmla.evaluate.lazy_model import LazyModel
from transmla.evaluate.report.report import ContextReport, ContextScore, Kind
from transmla.evaluate.result_cache import Arrays, ResultCache
from transmla.evaluate.token_scores import score_tokens
from transmla.evaluate.windows import ScoredWindows
from transmla.progress import Progress


class LongContextPart:
    """Needles and copies at several lengths, for all models."""

    field = "contexts"

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        *,
        results: ResultCache,
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
        self._cells: dict[tuple[Kind, int, float | None], list[RecallPrompt]] = {}
        for length in lengths:
            for depth in depths:
                self._cells["needle", length, depth] = [
                    needle_prompt(tokenizer, length=length, depth=depth, seed=seed, start=start) for seed in seeds
                ]
            self._cells["copy", length, None] = [
                copy_prompt(words, length=length, seed=seed, start=start) for seed in seeds
            ]
        for trials in self._cells.values():
            check_known(torch.tensor([trial.tokens for trial in trials]), vocab_size=vocab_size)
        self._found: list[tuple[str, list[Arrays]]] = []

    def measure(self, lazy: LazyModel, progress: Progress) -> None:
        """Have a model read all texts."""
        with progress.task(f"{lazy.name} looks back", sum(map(len, self._cells.values()))) as advance:
            found = []
            for trials in self._cells.values():
                windows = ScoredWindows(
                    tuple(torch.tensor(trial.tokens) for trial in trials),
                    tuple(len(trial.tokens) - trial.answer for trial in trials),
                    tokens_per_byte=1.0,
                )

                def read(windows: ScoredWindows = windows) -> Arrays:
                    return score_tokens(lazy.model, windows, batch_size=self._batch_size)

                found.append(self._results.arrays({"what": "text", **lazy.key, **windows.settings}, read))
                advance(len(trials))
        self._found.append((lazy.name, found))

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
