"""Looking back, with texts that are made: needles, copies, passages, keys of JSON, names of functions.

What must be said is known from the text alone, and perplexity hardly shows it. The texts are those of
:mod:`transmla.data.synthetic` and :mod:`transmla.data.probes`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import groupby
from statistics import fmean
from typing import get_args

import numpy
import torch

from transmla.config import EvalRequest, ProbeKind
from transmla.data.synthetic import RecallPrompt
from transmla.data.tokens import check_known
from transmla.data.vocabulary import SharedTokens
from transmla.errors import UsageError
from transmla.evaluate.lazy_model import LazyModel
from transmla.evaluate.paired_scores import PairedScores
from transmla.evaluate.parts.base import Part, Setting
from transmla.evaluate.parts.other_probes import OtherProbesPart
from transmla.evaluate.recall_texts import Cell, are_chosen, as_windows, write_texts
from transmla.evaluate.report.svg import as_svg, new_figure
from transmla.evaluate.report.text_table import Shown, TextTable, percent, small
from transmla.evaluate.result_cache import Arrays, ResultCache
from transmla.progress import Progress
from transmla.records import Record

_KINDS = get_args(ProbeKind)


class ContextScore(Record):
    """What a model says when it must look back: the share of tokens it gets right, and of texts without a mistake.

    ``kl`` from the source, in nats, and ``share_of_source``, the token accuracy as a share of the source's, are
    ``None`` for the source itself, and the share where the source gets nothing right.
    """

    model: str
    token_accuracy: float
    exact: float
    nll: float
    kl: float | None = None
    share_of_source: float | None = None


class ContextReport(Record):
    """Texts of one kind and length, with the needle at one depth: 0 at the start, 1 just before the question.

    ``num_positions`` tokens of all texts together must be said.
    """

    kind: ProbeKind
    length: int
    depth: float | None
    num_trials: int
    num_positions: int | None = None
    scores: tuple[ContextScore, ...]


class LongContextPart(Part):
    """Texts of several kinds and lengths in which all models look back."""

    name = "contexts"
    record = ContextReport
    flags = ("--needle-lengths",)

    @classmethod
    def wanted(cls, request: EvalRequest) -> bool:
        """Return whether there are lengths, or kinds that need them."""
        return bool(request.needle_lengths) or are_chosen(request)

    @classmethod
    def check(cls, request: EvalRequest) -> None:
        """Refuse kinds without lengths, and passages alone without a text.

        Raises:
            UsageError: which flag is missing.
        """
        if not request.needle_lengths:
            raise UsageError("--probes says what models look back for: pass --needle-lengths.")
        if set(request.probes) == {"passage"} and not request.dataset:
            raise UsageError("--probes passage needs text: pass --dataset.")

    @classmethod
    def longest(cls, request: EvalRequest) -> tuple[int, str]:
        """Return the longest text."""
        return max(request.needle_lengths), "--needle-lengths"

    @classmethod
    def build(cls, setting: Setting) -> Iterator[Part]:
        """Yield one part for all kinds and lengths, and what it comes to."""
        request = setting.request
        if "passage" in request.probes and not request.dataset:
            setting.tell("No passage is said twice, for there is no text: pass --dataset, or --probes without passage.")
        part = cls(
            write_texts(setting),
            results=setting.cache,
            source=setting.source,
            shared=setting.shared,
            vocab_size=setting.vocab_size,
            batch_size=request.batch_size,
        )
        yield part
        if request.converted:
            yield OtherProbesPart(part.report)

    @classmethod
    def tables(cls, records: Sequence[ContextReport], shown: Shown) -> Iterator[TextTable]:
        """Yield what every model says, by kind and length."""
        if records:
            yield _table(records, shown.names)

    @classmethod
    def plots(cls, records: Sequence[ContextReport], shown: Shown) -> Iterator[tuple[str, str]]:
        """Yield needles by length and depth, and the other kinds by length."""
        needles = [cell for cell in records if cell.kind == "needle"]
        if needles:
            yield "Needles: tokens said right", _needles(needles, shown.names)
        others = [cell for cell in records if cell.kind != "needle"]
        if len({cell.length for cell in others}) > 1:
            yield "Looking back: tokens said right, and their NLL", _by_length(others, shown.names)

    def __init__(
        self,
        texts: Mapping[Cell, Sequence[RecallPrompt]],
        *,
        results: ResultCache,
        source: LazyModel,
        shared: Mapping[str, SharedTokens],
        vocab_size: int,
        batch_size: int,
    ) -> None:
        """Take all texts.

        Args:
            texts: by kind, length and depth; those of a cell have as many tokens.
            results: where what is known lies.
            source: that the others are compared with.
            shared: the tokens that each of the others, by its folder, shares with the source.
            vocab_size: of the source.
            batch_size: texts at once.
        """
        self._counts: dict[Cell, numpy.ndarray] = {}
        self._scores: dict[Cell, PairedScores] = {}
        for cell, trials in texts.items():
            windows, self._counts[cell] = as_windows(trials)
            check_known(torch.stack(windows.tokens), vocab_size=vocab_size)
            self._scores[cell] = PairedScores(
                windows,
                what=f"looks back ({cell.kind}, {cell.length:,} tokens)",
                results=results,
                source=source,
                shared=shared,
                batch_size=batch_size,
            )
        self._found: dict[Cell, list[tuple[str, Arrays]]] = {cell: [] for cell in texts}

    def measure(self, lazy: LazyModel, progress: Progress) -> None:
        """Have a model read all texts."""
        for cell, scores in self._scores.items():
            self._found[cell].append((lazy.name, scores.of(lazy, progress)))

    def report(self) -> Iterator[ContextReport]:
        """Put everything together."""
        for cell, counts in self._counts.items():
            (_, source), *_ = found = self._found[cell]
            yield ContextReport(
                **cell._asdict(),
                num_trials=len(counts),
                num_positions=int(counts.sum()),
                scores=tuple(_score(name, scores, source, counts) for name, scores in found),
            )


def _score(name: str, scores: Arrays, source: Arrays, counts: numpy.ndarray) -> ContextScore:
    """Put together what a model says of the texts of a cell, where ``counts`` has which of their tokens count."""

    def of(found: Arrays, field: str) -> float:
        return float(found[field].reshape(counts.shape)[counts].mean(dtype=numpy.float64))

    accuracy, of_source = of(scores, "right"), of(source, "right")
    compared = {}
    if scores is not source:
        # A divergence is never negative, but the rounding of one that is zero may be.
        compared = {"kl": max(0.0, of(scores, "kl")), "share_of_source": accuracy / of_source if of_source else None}
    return ContextScore(
        model=name,
        token_accuracy=accuracy,
        exact=float((scores["right"].reshape(counts.shape) | ~counts).all(1).mean()),
        nll=of(scores, "nll"),
        **compared,
    )


def _in_order(records: Sequence[ContextReport]) -> Iterator[tuple[str, int, list[ContextReport]]]:
    """Yield kinds and lengths, each with its cells, which differ by their depths."""

    def place(cell: ContextReport) -> tuple[int, int]:
        return _KINDS.index(cell.kind), cell.length

    for (kind, length), cells in groupby(sorted(records, key=place), key=place):
        yield _KINDS[kind], length, list(cells)


def _table(records: Sequence[ContextReport], names: Sequence[str]) -> TextTable:
    rows = []
    for kind, length, cells in _in_order(records):
        right = [fmean(cell.scores[number].token_accuracy for cell in cells) for number in range(len(names))]
        for number, name in enumerate(names):
            scores = [cell.scores[number] for cell in cells]
            kl = [score.kl for score in scores if score.kl is not None]
            rows.append(
                (
                    "" if number else f"{kind}, {length:,}",
                    name,
                    percent(right[number]),
                    percent(right[number] / right[0] if number and right[0] else None),
                    small(fmean(score.nll for score in scores)),
                    small(fmean(kl) if kl else None),
                )
            )
    headings = ("Kind, tokens", "Model", "Said right", "Of the source's", "NLL", "KL")
    return TextTable("Looking back: tokens said right, and their NLL", headings, tuple(rows))


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


def _by_length(cells: Sequence[ContextReport], names: Sequence[str]) -> str:
    kinds = sorted({cell.kind for cell in cells}, key=_KINDS.index)
    figure = new_figure(1.5 + 2.4 * len(kinds), 4.6)
    panels = figure.subplots(2, len(kinds), squeeze=False, sharex=True, sharey="row")
    for (above, below), kind in zip(panels.T, kinds, strict=True):
        found = sorted((cell for cell in cells if cell.kind == kind), key=lambda cell: cell.length)
        lengths = [cell.length for cell in found]
        for number, name in enumerate(names):
            scores = [cell.scores[number] for cell in found]
            line = {"marker": "o", "color": f"C{number}", "label": name}
            above.plot(lengths, [score.token_accuracy for score in scores], **line)
            below.plot(lengths, [score.nll for score in scores], **line)
        above.set_title(kind, fontsize=8)
        below.set_xscale("log", base=2)
        below.set_xticks(lengths, labels=[f"{length:,}" for length in lengths], rotation=90, fontsize=7)
        below.set_xlabel("tokens")
        for axes in (above, below):
            axes.grid(alpha=0.3)
    panels[0, 0].yaxis.set_major_formatter("{x:.0%}")
    panels[0, 0].set_ylabel("said right")
    panels[1, 0].set_ylabel("NLL, nats")
    figure.legend(*panels[0, 0].get_legend_handles_labels(), loc="outside right upper", fontsize=8)
    return as_svg(figure)
