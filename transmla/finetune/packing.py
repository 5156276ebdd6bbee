"""Documents to sequences of equal length, in which no document sees another.

Documents stand one behind the other; positions begin anew with each, by which Transformers' masks keep them apart.
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator, Sequence

import torch
from jaxtyping import Int
from torch import Tensor
from torch.utils.data import Dataset, IterableDataset

from transmla.finetune.documents import Document
from transmla.finetune.student import IGNORED

Sequences = dict[str, Tensor]

_SHUFFLED_AT_ONCE = 1024


def pack(documents: Iterable[Document], *, window: int, pad_token: int) -> Iterator[Sequences]:
    """Fill sequences of ``window`` tokens: ``input_ids``, ``position_ids`` and ``labels``.

    Text is cut where a sequence ends, and goes on in the next. A conversation stays in one, and loses what is beyond a
    window; the room that it does not find is padded. The first token of each piece has nothing to be predicted from.
    Sequences in which nothing is to be learnt are left out.
    """
    row = _Row(window, pad_token)
    for document in documents:
        start, length = 0, len(document.tokens)
        if document.whole and min(length, window) > row.room:
            yield from row.take()
        while start < length:
            stop = min(length, start + row.room)
            row.add(document.tokens[start:stop], document.learnt[start:stop])
            start = length if document.whole else stop
            if not row.room:
                yield from row.take()
    yield from row.take()


class _Row:
    """One sequence, being filled."""

    def __init__(self, window: int, pad_token: int) -> None:
        self._window, self._pad_token = window, pad_token
        self._tokens: list[int] = []
        self._positions: list[int] = []
        self._labels: list[int] = []

    @property
    def room(self) -> int:
        return self._window - len(self._tokens)

    def add(self, tokens: Sequence[int], learnt: Sequence[bool]) -> None:
        self._tokens += tokens
        self._positions += range(len(tokens))
        labels = [token if learn else IGNORED for token, learn in zip(tokens, learnt, strict=True)]
        self._labels += [IGNORED, *labels[1:]] if labels else []

    def take(self) -> Iterator[Sequences]:
        """Yield the sequence, padded, if there is something to learn in it, and begin the next."""
        if any(label != IGNORED for label in self._labels):
            self.add([self._pad_token] * self.room, [False] * self.room)
            yield {
                "input_ids": torch.tensor(self._tokens),
                "position_ids": torch.tensor(self._positions),
                "labels": torch.tensor(self._labels),
            }
        self._tokens, self._positions, self._labels = [], [], []


class PackedDataset(Dataset[Sequences]):
    """Sequences in memory, nine bytes a token."""

    def __init__(self, sequences: Iterable[Sequences], *, first_index: int = 0) -> None:
        """Read all sequences; they are numbered from ``first_index`` on."""
        self._first_index = first_index
        rows = [(item["input_ids"].int(), item["position_ids"].int(), item["labels"] != IGNORED) for item in sequences]
        self._rows = [torch.stack(column) for column in zip(*rows, strict=True)]

    def __len__(self) -> int:
        return len(self._rows[0]) if self._rows else 0

    def __getitem__(self, index: int) -> Sequences:
        """Return one sequence, and its number."""
        tokens, positions, learnt = (column[index] for column in self._rows)
        tokens = tokens.long()
        labels = torch.where(learnt, tokens, IGNORED)
        return {
            "input_ids": tokens,
            "position_ids": positions.long(),
            "labels": labels,
            "index": torch.tensor(self._first_index + index),
        }

    @property
    def tokens(self) -> Int[Tensor, "sequences window"]:
        """Return all tokens."""
        return self._rows[0]

    @property
    def num_learnt(self) -> int:
        """Return how many tokens are to be predicted."""
        return int(self._rows[2].sum()) if self._rows else 0


class StreamedDataset(IterableDataset[Sequences]):
    """Sequences that are read when they are needed, over and over, shuffled within a thousand of them."""

    def __init__(self, sequences: Sequence[Iterable[Sequences]], *, seed: int) -> None:
        self._sources, self._seed = sequences, seed

    def __iter__(self) -> Iterator[Sequences]:
        """Start from the beginning; the order is the same each time, as resuming needs."""
        chooser = random.Random(self._seed)
        held: list[Sequences] = []
        for sequence in self._endless():
            held.append(sequence)
            if len(held) == _SHUFFLED_AT_ONCE:
                last = chooser.randrange(len(held))
                held[last], held[-1] = held[-1], held[last]
                yield held.pop()

    def _endless(self) -> Iterator[Sequences]:
        """Take from all sources in turn, each from its start again when it has ended."""
        streams = [iter(source) for source in self._sources]
        while True:
            for number, source in enumerate(self._sources):
                try:
                    yield next(streams[number])
                except StopIteration:
                    streams[number] = iter(source)
                    yield next(streams[number])
