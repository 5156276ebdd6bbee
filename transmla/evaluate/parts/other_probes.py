"""Looking back as one number: how much of what the source gets right in the probes a converted model gets right.

Copies and passages are left out: conversions may be fitted on texts of that form.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from statistics import fmean
from typing import TYPE_CHECKING

from transmla.config import EvalRequest
from transmla.evaluate.lazy_model import LazyModel
from transmla.evaluate.parts.base import Part, Setting
from transmla.evaluate.report.text_table import Shown, TextTable, percent
from transmla.progress import Progress
from transmla.records import Record

if TYPE_CHECKING:
    from transmla.evaluate.parts.long_context import ContextReport

FITTED_KINDS = ("copy", "passage")
"""Kinds whose form is that of texts on which conversions may be fitted."""
LEAST_ACCURACY = 0.1
"""Below it, the source's accuracy in a cell is too small to compare with."""


class OtherProbesScore(Record):
    """A model's token accuracy as a share of the source's: the mean over kinds of the mean over their cells."""

    model: str
    share_of_source: float


class OtherProbesReport(Record):
    """Accuracy on probes other than copies and passages, where the source is right in a tenth of the tokens or more.

    ``kinds`` are those that have such cells, of which there are ``num_cells``; the source's own entry is ``None``.
    """

    kinds: tuple[str, ...]
    num_cells: int
    scores: tuple[OtherProbesScore | None, ...]


class OtherProbesPart(Part):
    """What the cells of :class:`~transmla.evaluate.parts.long_context.LongContextPart` come to, which makes it."""

    name = "other_probes"
    record = OtherProbesReport

    @classmethod
    def wanted(cls, request: EvalRequest) -> bool:
        """Return no: it comes with the cells."""
        return False

    @classmethod
    def build(cls, setting: Setting) -> Iterator[Part]:
        """Yield nothing by itself."""
        yield from ()

    @classmethod
    def tables(cls, records: Sequence[OtherProbesReport], shown: Shown) -> Iterator[TextTable]:
        """Yield a number for each conversion."""
        for found in records:
            rows = [
                (name, percent(score.share_of_source))
                for name, score in zip(shown.names, found.scores, strict=True)
                if score is not None
            ]
            title = f"Accuracy on other probes ({', '.join(found.kinds)})"
            yield TextTable(title, ("Model", "Of the source's"), tuple(rows))

    def __init__(self, cells: Callable[[], Iterable[ContextReport]]) -> None:
        """Take what gives the cells when all models have been measured."""
        self._cells = cells

    def measure(self, lazy: LazyModel, progress: Progress) -> None:
        """Do nothing: the cells are measured already."""

    def report(self) -> Iterator[OtherProbesReport]:
        """Put the cells together, where any counts."""
        kinds: dict[str, list[ContextReport]] = {}
        for cell in self._cells():
            if cell.kind not in FITTED_KINDS and cell.scores[0].token_accuracy >= LEAST_ACCURACY:
                kinds.setdefault(cell.kind, []).append(cell)
        if not kinds:
            return
        names = [score.model for score in next(iter(kinds.values()))[0].scores]
        shares = (
            fmean(fmean(cell.scores[number].share_of_source or 0.0 for cell in cells) for cells in kinds.values())
            for number in range(1, len(names))
        )
        yield OtherProbesReport(
            kinds=tuple(kinds),
            num_cells=sum(map(len, kinds.values())),
            scores=(
                None,
                *(
                    OtherProbesScore(model=name, share_of_source=share)
                    for name, share in zip(names[1:], shares, strict=True)
                ),
            ),
        )
