"""Documents to sequences of equal length, in which no document sees another.

Documents stand one behind the other; positions begin anew with each, by which Transformers' masks keep them apart.
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import groupby

import torch
from jaxtyping import Bool, Int
from torch import Tensor
from torch.utils.data import Dataset, IterableDataset

from transmla.finetune.documents import Document
from transmla.finetune.student import IGNORED

Sequences = dict[str, Tensor]

_SHUFFLED_AT_ONCE = 1024
_GOLDEN_RATIO = 0.6180339887498949


@dataclass
class Row:
    """A window of documents, one behind the other.

    Attributes:
        tokens: all of them.
        begins: whether a document begins with a token.
        learnt: whether a token is to be predicted.
        flows: nothing in it must stay in one piece, so that it may as well be cut elsewhere.
    """

    tokens: list[int] = field(default_factory=list)
    begins: list[bool] = field(default_factory=list)
    learnt: list[bool] = field(default_factory=list)
    flows: bool = True

    def add(self, tokens: Sequence[int], learnt: Sequence[bool], *, begins: bool, flows: bool) -> None:
        """Put a document, or a piece of it, behind the others."""
        self.tokens += tokens
        self.begins += [begins and number == 0 for number in range(len(tokens))]
        self.learnt += learnt
        self.flows = self.flows and flows

    def lay_out(self) -> Sequences:
        """Return what the model reads."""
        return lay_out(torch.tensor(self.tokens), torch.tensor(self.begins), torch.tensor(self.learnt))


def lay_out(
    tokens: Int[Tensor, " window"], begins: Bool[Tensor, " window"], learnt: Bool[Tensor, " window"]
) -> Sequences:
    """Return ``input_ids``, ``position_ids`` and ``labels``; the first token of each piece is not to be predicted."""
    places = torch.arange(len(tokens))
    positions = places - torch.where(begins, places, 0).cummax(0).values
    return {
        "input_ids": tokens,
        "position_ids": positions,
        "labels": torch.where(learnt & (positions > 0), tokens, IGNORED),
    }


def pack(documents: Iterable[Document], *, window: int, pad_token: int) -> Iterator[Row]:
    """Fill rows of ``window`` tokens.

    Text is cut where a row ends, and goes on in the next. A conversation stays in one, and loses what is beyond a
    window; the room that it does not find is padded. Rows in which nothing is to be learnt are left out.
    """
    row = Row()
    for document in documents:
        start, length = 0, len(document.tokens)
        if document.whole and min(length, window) > window - len(row.tokens):
            yield from _padded(row, window, pad_token)
            row = Row()
        while start < length:
            stop = min(length, start + window - len(row.tokens))
            begins = document.begins and start == 0
            row.add(document.tokens[start:stop], document.learnt[start:stop], begins=begins, flows=not document.whole)
            start = length if document.whole else stop
            if len(row.tokens) == window:
                yield from _padded(row, window, pad_token)
                row = Row()
    yield from _padded(row, window, pad_token)


def _padded(row: Row, window: int, pad_token: int) -> Iterator[Row]:
    """Yield a row, if there is something to learn in it."""
    if row.tokens and (row.lay_out()["labels"] != IGNORED).any():
        if room := window - len(row.tokens):
            row.add([pad_token] * room, [False] * room, begins=True, flows=False)
        yield row


class PackedDataset(Dataset[Sequences]):
    """Sequences in memory, six bytes a token.

    Rows that flow follow each other in their text: :meth:`set_epoch` cuts them anew, so that no two passes show the
    model the same beginnings.
    """

    def __init__(self, rows: Iterable[Row], *, first_index: int = 0) -> None:
        """Read all rows; they are numbered from ``first_index`` on."""
        self._first_index, self._offset = first_index, 0
        tokens, begins, learnt, flows = [], [], [], []
        for row in rows:
            tokens.append(torch.tensor(row.tokens, dtype=torch.int32))
            begins.append(torch.tensor(row.begins))
            learnt.append(torch.tensor(row.learnt))
            flows.append(row.flows)
        self._columns = [torch.stack(column) for column in (tokens, begins, learnt) if column]
        self._runs: list[range] = []
        for flowing, run in groupby(range(len(flows)), key=flows.__getitem__):
            numbers = list(run)
            whole = range(numbers[0], numbers[-1] + 1)
            self._runs += [whole if flowing else range(number, number + 1) for number in numbers]
        self._flows = flows

    def __len__(self) -> int:
        return len(self._runs)

    def set_epoch(self, epoch: int) -> None:
        """Cut for a pass: the first time where the rows end, then elsewhere, spread over a window."""
        self._offset = int(epoch * _GOLDEN_RATIO % 1 * self.tokens.shape[1])

    def __getitem__(self, index: int) -> Sequences:
        """Return one sequence, and its number."""
        run, window = self._runs[index], self.tokens.shape[1]
        places = torch.arange(window) + (index - run.start) * window + (self._offset if self._flows[index] else 0)
        # What is left over at the end of a run stands before its start.
        places %= len(run) * window
        tokens, begins, learnt = (column.view(-1)[run.start * window + places] for column in self._columns)
        return lay_out(tokens.long(), begins | (places == 0), learnt) | {
            "index": torch.tensor(self._first_index + index)
        }

    @property
    def tokens(self) -> Int[Tensor, "sequences window"]:
        """Return all tokens."""
        return self._columns[0]


class StreamedDataset(IterableDataset[Sequences]):
    """Sequences that are read when they are needed, over and over, shuffled within a thousand of them."""

    def __init__(self, sources: Sequence[Iterable[Row]], *, seed: int) -> None:
        self._sources, self._seed = sources, seed

    def __iter__(self) -> Iterator[Sequences]:
        """Start from the beginning; the order is the same each time, as resuming needs."""
        chooser = random.Random(self._seed)
        held: list[Sequences] = []
        for row in self._endless():
            held.append(row.lay_out())
            if len(held) == _SHUFFLED_AT_ONCE:
                last = chooser.randrange(len(held))
                held[last], held[-1] = held[-1], held[last]
                yield held.pop()

    def _endless(self) -> Iterator[Row]:
        """Take from all sources in turn, each from its start again when it has ended."""
        streams = [iter(source) for source in self._sources]
        while True:
            for number, source in enumerate(self._sources):
                try:
                    yield next(streams[number])
                except StopIteration:
                    streams[number] = iter(source)
                    yield next(streams[number])
