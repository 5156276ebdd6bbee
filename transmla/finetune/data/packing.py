"""Documents to sequences of equal length, in which no document sees another.

Documents stand one after the other; positions begin anew with each, by which Transformers' masks keep them apart.
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import count, groupby, islice

import torch
from jaxtyping import Bool, Int
from torch import Tensor
from torch.utils.data import Dataset, IterableDataset, get_worker_info

from transmla.config import Overflow
from transmla.finetune.data.documents import Document
from transmla.finetune.distill.student import IGNORE_INDEX

Sequences = dict[str, Tensor]

_SHUFFLED_AT_ONCE = 1024
_GOLDEN_RATIO = 0.6180339887498949


@dataclass
class Row:
    """A window of documents, one after the other.

    Attributes:
        tokens: all of them.
        document_start: whether a document begins with a token.
        loss_mask: whether a token is to be predicted.
        splittable: nothing in it must stay in one piece, so that it may as well be cut elsewhere.
    """

    tokens: list[int] = field(default_factory=list)
    document_start: list[bool] = field(default_factory=list)
    loss_mask: list[bool] = field(default_factory=list)
    splittable: bool = True

    def add(self, tokens: Sequence[int], loss_mask: Sequence[bool], *, document_start: bool, splittable: bool) -> None:
        """Put a document, or a piece of it, after the others."""
        self.tokens += tokens
        self.document_start += [document_start and number == 0 for number in range(len(tokens))]
        self.loss_mask += loss_mask
        self.splittable = self.splittable and splittable

    def lay_out(self) -> Sequences:
        """Return what the model reads."""
        return lay_out(torch.tensor(self.tokens), torch.tensor(self.document_start), torch.tensor(self.loss_mask))


def lay_out(
    tokens: Int[Tensor, " window"], document_start: Bool[Tensor, " window"], loss_mask: Bool[Tensor, " window"]
) -> Sequences:
    """Return ``input_ids``, ``position_ids`` and ``labels``; the first token of each piece is not to be predicted."""
    places = torch.arange(len(tokens))
    positions = places - torch.where(document_start, places, 0).cummax(0).values
    return {
        "input_ids": tokens,
        "position_ids": positions,
        "labels": torch.where(loss_mask & (positions > 0), tokens, IGNORE_INDEX),
    }


@dataclass
class Counts:
    """What became of the documents of a data set, counted while it is packed.

    Attributes:
        num_chats: conversations.
        num_long: those among them that are longer than a window.
        num_learnable: tokens that were to be learnt.
        num_lost: those among them that are not, for they are beyond a window, or their conversation was left out.
    """

    num_chats: int = 0
    num_long: int = 0
    num_learnable: int = 0
    num_lost: int = 0


def pack(
    documents: Iterable[Document],
    *,
    window: int,
    pad_token: int,
    start: Sequence[int] = (),
    overflow: Overflow = "cut",
    counts: Counts | None = None,
) -> Iterator[Row]:
    """Fill rows of ``window`` tokens.

    Text is cut where a row ends, and goes on in the next. A conversation stays in one; the room that it does not find
    is padded. Rows in which nothing is to be learnt are left out.

    Args:
        documents: in their order.
        window: tokens of a row.
        pad_token: fills what is left of one.
        start: what a row begins with in which a document goes on.
        overflow: what becomes of a conversation that is longer than a row.
        counts: where it is counted what is lost.
    """
    row, counts = Row(), counts or Counts()

    def finished() -> Iterator[Row]:
        return _finished(row, window, pad_token, start)

    for document in documents:
        counts.num_learnable += sum(document.loss_mask)
        counts.num_chats += document.whole
        for part in _fitting(document, window, len(start), overflow, counts):
            first, length = 0, len(part.tokens)
            if row.tokens and part.whole and (not part.document_start or length > _room(row, window, start)):
                yield from finished()
                row = Row()
            while first < length:
                document_start = part.document_start and first == 0
                stop = min(length, first + _room(row, window, start, document_start=document_start))
                # What is cut anew in each pass has no place for a start.
                row.add(
                    part.tokens[first:stop],
                    part.loss_mask[first:stop],
                    document_start=document_start,
                    splittable=not (part.whole or start),
                )
                first = stop
                if not _room(row, window, start):
                    yield from finished()
                    row = Row()
    yield from finished()


def _room(row: Row, window: int, start: Sequence[int], *, document_start: bool = True) -> int:
    """Return how many tokens a row still takes; one in which a document goes on keeps room for the start."""
    goes_on = not (row.document_start[0] if row.tokens else document_start)
    return window - len(row.tokens) - (len(start) if goes_on else 0)


def _fitting(document: Document, window: int, kept: int, overflow: Overflow, counts: Counts) -> Iterator[Document]:
    """Yield what is kept of a document, in parts that fit into a row where they must."""
    if not document.whole or len(document.tokens) <= window:
        yield document
        return
    counts.num_long += 1
    if overflow == "drop":
        counts.num_lost += sum(document.loss_mask)
        return
    yield Document(document.tokens[:window], document.loss_mask[:window], whole=True)
    if overflow == "cut":
        counts.num_lost += sum(document.loss_mask[window:])
        return
    # Nothing comes before the first token of a row, so that it cannot be learnt: where no start does, the one before is
    # there once more.
    again = 0 if kept else 1
    room = window - kept - again
    for first in range(window, len(document.tokens), room):
        tokens = document.tokens[first - again : first + room]
        yield Document(
            tokens, [*[False] * again, *document.loss_mask[first : first + room]], whole=True, document_start=False
        )


def _finished(row: Row, window: int, pad_token: int, start: Sequence[int]) -> Iterator[Row]:
    """Yield a row of full length, if there is something to learn in it."""
    if not row.tokens:
        return
    if start and not row.document_start[0]:
        given = [False] * len(start)
        row.tokens, row.loss_mask, row.document_start = (
            [*start, *row.tokens],
            given + row.loss_mask,
            given + row.document_start,
        )
    # Only now: what comes after a start can be learnt.
    if (row.lay_out()["labels"] == IGNORE_INDEX).all():
        return
    if left := window - len(row.tokens):
        row.add([pad_token] * left, [False] * left, document_start=True, splittable=False)
    yield row


class Filler(int):
    """The number of a sequence that only keeps a process in step with the others: nothing in it is to be learnt."""


class PackedDataset(Dataset[Sequences]):
    """Sequences in memory, six bytes a token.

    Rows that flow follow each other in their text: :meth:`set_epoch` cuts them anew, so that no two passes show the
    model the same beginnings.
    """

    def __init__(self, rows: Iterable[Row], *, first_index: int = 0) -> None:
        """Read all rows; they are numbered from ``first_index`` on."""
        self._first_index = first_index
        # Workers that outlive a pass have a copy of everything else, and would never hear of the next one.
        self._offset = torch.zeros((), dtype=torch.int64).share_memory_()
        tokens, document_start, loss_mask, splittable = [], [], [], []
        for row in rows:
            tokens.append(torch.tensor(row.tokens, dtype=torch.int32))
            document_start.append(torch.tensor(row.document_start))
            loss_mask.append(torch.tensor(row.loss_mask))
            splittable.append(row.splittable)
        self._columns = [torch.stack(column) for column in (tokens, document_start, loss_mask) if column]
        self._runs: list[range] = []
        for flowing, run in groupby(range(len(splittable)), key=splittable.__getitem__):
            numbers = list(run)
            whole = range(numbers[0], numbers[-1] + 1)
            self._runs += [whole if flowing else range(number, number + 1) for number in numbers]
        self._flows = splittable

    def __len__(self) -> int:
        return len(self._runs)

    def set_epoch(self, epoch: int) -> None:
        """Cut for a pass: the first time where the rows end, then elsewhere, spread over a window."""
        self._offset.fill_(int(epoch * _GOLDEN_RATIO % 1 * self.tokens.shape[1]))

    def __getitem__(self, index: int) -> Sequences:
        """Return one sequence, and its number."""
        run, window = self._runs[index], self.tokens.shape[1]
        places = torch.arange(window) + (index - run.start) * window + (int(self._offset) if self._flows[index] else 0)
        # What is left over at the end of a run stands before its start.
        places %= len(run) * window
        tokens, document_start, loss_mask = (column.view(-1)[run.start * window + places] for column in self._columns)
        if isinstance(index, Filler):
            loss_mask = torch.zeros_like(loss_mask)
        return lay_out(tokens.long(), document_start | (places == 0), loss_mask) | {
            "index": torch.tensor(self._first_index + index)
        }

    @property
    def tokens(self) -> Int[Tensor, "sequences window"]:
        """Return all tokens."""
        return self._columns[0]


class StreamedDataset(IterableDataset[Sequences]):
    """Sequences that are read when they are needed, pass after pass, shuffled within a thousand of them.

    Each pass has every sequence once, however many sources there are, and however long each is. Several workers of a
    loader share a pass: all of them read everything, and each lays out its share.
    """

    def __init__(self, sources: Sequence[Iterable[Row]], *, seed: int) -> None:
        self._sources, self._seed = sources, seed

    def __iter__(self) -> Iterator[Sequences]:
        """Start from the beginning; the order is the same each time, as resuming needs."""
        worker = get_worker_info()
        own, workers = (worker.id, worker.num_workers) if worker else (0, 1)
        for row in islice(self._passes(), own, None, workers):
            yield row.lay_out()

    def _passes(self) -> Iterator[Row]:
        for number in count():
            empty = True
            for row in _shuffled(_in_turn(self._sources), random.Random(f"{self._seed}, {number}")):
                empty = False
                yield row
            if empty:
                return


def _in_turn(sources: Sequence[Iterable[Row]]) -> Iterator[Row]:
    """Take one from each source, then the next from each, until all have ended."""
    streams = [iter(source) for source in sources]
    while streams:
        found = [(stream, row) for stream in streams if (row := next(stream, None)) is not None]
        yield from (row for _, row in found)
        streams = [stream for stream, _ in found]


def _shuffled(rows: Iterable[Row], chooser: random.Random) -> Iterator[Row]:
    """Hold so many rows, and let any of them go whenever one more comes; in the end all."""
    held: list[Row] = []
    for row in rows:
        held.append(row)
        if len(held) == _SHUFFLED_AT_ONCE:
            last = chooser.randrange(len(held))
            held[last], held[-1] = held[-1], held[last]
            yield held.pop()
    chooser.shuffle(held)
    yield from held
