"""What a part of an evaluation is: a file of this folder with its records, what it measures, its tables and plots.

The run, the tables, the HTML report and the model cards go through the registry. See
docs/developers/add-an-eval-part.md.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from transformers import PreTrainedTokenizerBase

from transmla.config import EvalRequest
from transmla.data.vocabulary import SharedTokens
from transmla.errors import UsageError
from transmla.evaluate.lazy_model import LazyModel
from transmla.evaluate.report.text_table import Shown, TextTable
from transmla.evaluate.result_cache import ResultCache
from transmla.evaluate.windows import ScoredWindows
from transmla.progress import Progress
from transmla.records import Record


@dataclass(frozen=True)
class Setting:
    """What parts are made from.

    Attributes:
        request: what is wanted.
        source: what the others are compared with.
        cache: of results.
        tokenizer: of all models, which is the source's.
        vocab_size: rows of the source's embedding.
        texts: the data sets, as windows, in the order of the request.
        shared: the tokens that each model, by its folder, shares with the source.
        start: tokens that a text begins with.
        device: of the computation.
        progress: who is told how far the work has come.
        tell: is given what may not be as it was meant, a sentence each.
    """

    request: EvalRequest
    source: LazyModel
    cache: ResultCache
    tokenizer: PreTrainedTokenizerBase
    vocab_size: int
    texts: Mapping[str, ScoredWindows]
    shared: Mapping[str, SharedTokens]
    start: Sequence[int]
    device: torch.device
    progress: Progress
    tell: Callable[[str], None]

    @property
    def first_text(self) -> tuple[str, ScoredWindows]:
        """Return the first data set."""
        return next(iter(self.texts.items()))


class Part(ABC):
    """A part of the report: it is shown every model, the source first, and says in the end what it has found.

    In its records, ``scores[i]`` belongs to the model i of the report; the source's entry is there, and ``None`` where
    it makes no sense.

    Attributes:
        name: of its field in the report.
        record: what it finds; the report has any number of them.
        flags: by which it is asked for.
        on_first_text: whether it compares conversions with their source on the first data set, and so needs both.
        compares: whether it says nothing of a source alone, whatever the text.
    """

    name: ClassVar[str]
    record: ClassVar[type[Record]]
    flags: ClassVar[tuple[str, ...]] = ()
    on_first_text: ClassVar[bool] = False
    compares: ClassVar[bool] = False

    @classmethod
    @abstractmethod
    def wanted(cls, request: EvalRequest) -> bool:
        """Return whether a request asks for it."""

    @classmethod
    def check(cls, request: EvalRequest) -> None:
        """Refuse what cannot be measured, before anything is loaded.

        Raises:
            TransMLAError: which flags, and what would do.
        """
        if cls.on_first_text and not request.dataset:
            raise UsageError(f"{cls.flags[0]} needs text: pass --dataset.")
        if (cls.compares or cls.on_first_text) and not request.converted:
            raise UsageError(f"{cls.flags[0]} compares a source with conversions of it: pass CONVERTED.")

    @classmethod
    def longest(cls, request: EvalRequest) -> tuple[int, str]:
        """Return the most tokens that models must read at once, and the flag that says so."""
        return 1, ""

    @classmethod
    @abstractmethod
    def build(cls, setting: Setting) -> Iterator[Part]:
        """Yield what measures it, one or several."""

    @abstractmethod
    def measure(self, lazy: LazyModel, progress: Progress) -> None:
        """Look at a model."""

    @abstractmethod
    def report(self) -> Iterable[Record]:
        """Return what was found."""

    @classmethod
    def only(cls, record: Any, number: int, full_names: Sequence[str]) -> Record | None:
        """Return what a record says of the source and of the model of that number; nothing where it says nothing."""
        scores = (record.scores[0], record.scores[number])
        return record.model_copy(update={"scores": scores})

    @classmethod
    @abstractmethod
    def tables(cls, records: Sequence[Any], shown: Shown) -> Iterator[TextTable]:
        """Yield its tables."""

    @classmethod
    def plots(cls, records: Sequence[Any], shown: Shown) -> Iterator[tuple[str, str]]:
        """Yield a title and an SVG for each of its plots."""
        yield from ()
