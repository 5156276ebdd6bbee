"""Long context without a download: a needle in a haystack, and copying (:mod:`transmla.data.synthetic`)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import groupby
from statistics import fmean
from typing import Literal

import numpy
import torch
from transformers import PreTrainedTokenizerBase

from transmla.config import EvalRequest
from transmla.data.synthetic import RecallPrompt, copy_prompt, needle_prompt, whole_words
from transmla.data.tokens import check_known
from transmla.evaluate.lazy_model import LazyModel
from transmla.evaluate.parts.base import Part, Setting
from transmla.evaluate.report.svg import as_svg, new_figure
from transmla.evaluate.report.text_table import Shown, TextTable, percent
from transmla.evaluate.result_cache import Arrays, ResultCache
from transmla.evaluate.token_scores import score_tokens
from transmla.evaluate.windows import ScoredWindows
from transmla.progress import Progress
from transmla.records import Record

Kind = Literal["needle", "copy"]
"""What a model looks back for."""


class ContextScore(Record):
    """What a model says when it must look back: the share of tokens it gets right, and of texts without a mistake."""

    model: str
    token_accuracy: float
    exact: float
    nll: float


class ContextReport(Record):
    """Texts of one kind and length, with the needle at one depth: 0 at the start, 1 just before the question."""

    kind: Kind
    length: int
    depth: float | None
    num_trials: int
    scores: tuple[ContextScore, ...]


class LongContextPart(Part):
    """Needles and copies at several lengths, for all models."""

    name = "contexts"
    record = ContextReport
    flags = ("--needle-lengths",)

    @classmethod
    def wanted(cls, request: EvalRequest) -> bool:
        """Return whether there are lengths."""
        return bool(request.needle_lengths)

    @classmethod
    def longest(cls, request: EvalRequest) -> tuple[int, str]:
        """Return the longest text."""
        return max(request.needle_lengths), "--needle-lengths"

    @classmethod
    def build(cls, setting: Setting) -> Iterator[Part]:
        """Yield one part for all lengths."""
        request = setting.request
        yield cls(
            setting.tokenizer,
            results=setting.cache,
            vocab_size=setting.vocab_size,
            lengths=sorted(set(request.needle_lengths)),
            num_depths=request.needle_depths,
            num_trials=request.needle_trials,
            batch_size=request.batch_size,
            start=setting.start,
        )

    @classmethod
    def tables(cls, records: Sequence[ContextReport], shown: Shown) -> Iterator[TextTable]:
        """Yield the shares of tokens, by kind and length."""
        if records:
            yield _table(records, shown.names)

    @classmethod
    def plots(cls, records: Sequence[ContextReport], shown: Shown) -> Iterator[tuple[str, str]]:
        """Yield needles by length and depth, and copies by length."""
        needles = [cell for cell in records if cell.kind == "needle"]
        if needles:
            yield "Needles: tokens said right", _needles(needles, shown.names)
        copies = [cell for cell in records if cell.kind == "copy"]
        if len(copies) > 1:
            yield "Copies: tokens said right", _copies(copies, shown.names)

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


def _table(records: Sequence[ContextReport], names: Sequence[str]) -> TextTable:
    rows = []
    cells = sorted(records, key=lambda cell: (cell.kind, cell.length))
    for (kind, length), group in groupby(cells, key=lambda cell: (cell.kind, cell.length)):
        columns = zip(*(cell.scores for cell in group), strict=True)
        shares = (fmean(score.token_accuracy for score in column) for column in columns)
        rows.append((kind, f"{length:,}", *map(percent, shares)))
    return TextTable("Looking back: tokens said right", ("Task", "Tokens", *names), tuple(rows))


def _needles(cells: Sequence[ContextReport], names: Sequence[str]) -> str:
    lengths, depths = (sorted({getattr(cell, key) for cell in cells}) for key in ("length", "depth"))
    figure = new_figure(1.2 + 0.5 * len(names) * (len(lengths) + 1), 1.4 + 0.35 * len(depths))
    panels = figure.subplots(1, len(names), squeeze=False, sharey=True)[0]
    for number, (axes, name) in enumerate(zip(panels, names, strict=True)):
        shares = numpy.zeros((len(depths), len(lengths)))
        for cell in cells:
            shares[depths.index(cell.depth), lengths.index(cell.length)] = cell.scores[number].token_accuracy
        image = axes.imshow(shares, vmin=0, vmax=1, cmap="RdYlGn", aspect="auto")
        for row, column in numpy.ndindex(*shares.shape):
            axes.text(column, row, f"{shares[row, column]:.0%}", ha="center", va="center", fontsize=6)
        axes.set_xticks(range(len(lengths)), labels=[f"{length:,}" for length in lengths], rotation=90, fontsize=7)
        axes.set_title(name, fontsize=8)
    panels[0].set_yticks(range(len(depths)), labels=[f"{depth:.0%}" for depth in depths], fontsize=7)
    panels[0].set_ylabel("depth")
    figure.colorbar(image, ax=list(panels))
    return as_svg(figure)


def _copies(cells: Sequence[ContextReport], names: Sequence[str]) -> str:
    figure = new_figure(8.0, 3.0)
    axes = figure.subplots()
    lengths = [cell.length for cell in cells]
    for number, name in enumerate(names):
        shares = [cell.scores[number].token_accuracy for cell in cells]
        axes.plot(lengths, shares, marker="o", color=f"C{number}", label=name)
    axes.set_xscale("log", base=2)
    axes.set_xticks(lengths, labels=[f"{length:,}" for length in lengths])
    axes.set_xlabel("tokens")
    axes.yaxis.set_major_formatter("{x:.0%}")
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    return as_svg(figure)
