"""Text to passages: what a model reads at once, and which of its tokens are judged.

Perplexities differ by how a text is cut, so each protocol that people quote is a way to cut it:

- windows of equal length side by side, as GPTQ's and TransMLA's tables have it;
- windows that advance by a stride less than their length, where only what is new counts, so that every token is judged
  with much before it;
- each document by itself, with the token that begins a text where the tokenizer has one.

The first token of a passage is never judged: nothing comes before it.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path

import numpy
import torch
from jaxtyping import Int
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from transmla.calibration.rows import has_rows, open_rows
from transmla.calibration.text import choose_column, first_tokens, open_documents, read_text
from transmla.calibration.tokens import encode_text
from transmla.errors import DataError, UsageError


@dataclass(frozen=True)
class Passages:
    """What is read, and from where on in each passage it is judged.

    Attributes:
        tokens: one tensor for each passage.
        first: index of the first token that is judged, at least 1, for each passage.
        tokens_per_byte: of the text, in UTF-8; turns nats a token into bits a byte.
    """

    tokens: tuple[Int[Tensor, " _"], ...]
    first: tuple[int, ...]
    tokens_per_byte: float

    @property
    def num_tokens(self) -> int:
        """Return how many tokens are read."""
        return sum(map(len, self.tokens))

    @property
    def num_positions(self) -> int:
        """Return how many tokens are judged."""
        return sum(len(tokens) - first for tokens, first in zip(self.tokens, self.first, strict=True))

    @property
    def longest(self) -> int:
        """Return the tokens of the longest passage."""
        return max(map(len, self.tokens))

    @property
    def sha256(self) -> str:
        """Return the hash of all tokens, one passage after the other."""
        return hashlib.sha256(torch.cat(self.tokens).numpy().astype("<i8").tobytes()).hexdigest()

    @property
    def settings(self) -> dict[str, object]:
        """Return all that decides what is measured, but for the models."""
        cuts = hashlib.sha256(repr((tuple(map(len, self.tokens)), self.first)).encode()).hexdigest()
        return {"tokens": self.sha256, "cuts": cuts}

    def places(self) -> tuple[numpy.ndarray, numpy.ndarray]:
        """Return, for each judged token in order, the number of its passage, and how many tokens are before it."""
        counts = [len(tokens) - first for tokens, first in zip(self.tokens, self.first, strict=True)]
        before = [numpy.arange(first, len(tokens)) for tokens, first in zip(self.tokens, self.first, strict=True)]
        return numpy.repeat(numpy.arange(len(counts)), counts), numpy.concatenate(before)

    def head(self, count: int) -> Passages:
        """Return the first passages."""
        return Passages(self.tokens[:count], self.first[:count], self.tokens_per_byte)

    def starts(self, count: int, *, num_tokens: int) -> Int[Tensor, "passages tokens"]:
        """Return the first tokens of passages that are long enough, spread evenly over the text.

        Raises:
            UsageError: there are not as many.
        """
        long = [tokens for tokens in self.tokens if len(tokens) >= num_tokens]
        if len(long) < count:
            raise UsageError(
                f"The text has {len(long)} passages of {num_tokens} tokens or more, but --greedy-prompts is {count}: "
                "lower it, or --window, or raise --max-tokens."
            )
        return torch.stack([long[number * len(long) // count][:num_tokens] for number in range(count)])

    def batches(self, size: int) -> Iterator[tuple[Int[Tensor, "passages tokens"], int]]:
        """Yield neighbours of one shape, ``size`` at most, with the index of the first token that is judged."""
        alike = groupby(zip(self.tokens, self.first, strict=True), key=lambda passage: (len(passage[0]), passage[1]))
        for (_, first), run in alike:
            stacked = torch.stack([tokens for tokens, _ in run])
            for batch in stacked.split(size):
                yield batch, first


def read_passages(
    dataset: str,
    tokenizer: PreTrainedTokenizerBase,
    *,
    window: int,
    stride: int | None = None,
    per_document: bool = False,
    max_tokens: int | None = None,
    text_column: str | None = None,
) -> Passages:
    """Read a text and cut it.

    Args:
        dataset: text, JSON lines, JSON or parquet file, or hub data set.
        tokenizer: of the models.
        window: tokens of a passage; those of documents may be shorter.
        stride: tokens by which windows advance; their length by default. A tail shorter than a window is dropped then,
            and read where windows overlap.
        per_document: each row of a data set by itself; a text file is one document.
        max_tokens: stop after this many, rounded to whole windows where they stand side by side, and up to
            whole documents.
        text_column: column that holds the text.

    Raises:
        DataError: it cannot be read, or is too short.
    """
    if per_document:
        return _documents(dataset, tokenizer, window, stride or window, max_tokens, text_column)
    side_by_side = stride is None or stride >= window
    limit = max_tokens
    if limit is not None:
        limit = max(1, limit // window) * window if side_by_side else max(window, limit)
    tokens = first_tokens(open_documents(dataset, text_column=text_column), tokenizer, limit)
    if len(tokens) < window:
        raise DataError(
            f"The text of {dataset} has {len(tokens)} tokens; one window needs {window}: pass more text or lower "
            "--window."
        )
    if side_by_side:
        tokens = tokens[: len(tokens) // window * window]
    num_bytes = len(tokenizer.decode(tokens, clean_up_tokenization_spaces=False).encode())
    return _passages(list(_slide(tokens, window, stride or window)), len(tokens) / num_bytes)


def _documents(
    dataset: str,
    tokenizer: PreTrainedTokenizerBase,
    window: int,
    stride: int,
    max_tokens: int | None,
    text_column: str | None,
) -> Passages:
    cuts: list[tuple[Tensor, int]] = []
    num_tokens = num_bytes = 0
    for text in _texts(dataset, text_column):
        tokens = torch.tensor(encode_text(text, tokenizer), dtype=torch.int64)
        if len(tokens) > 1:
            cuts += _slide(tokens, window, stride)
            num_tokens += len(tokens)
            num_bytes += len(text.encode())
        if max_tokens is not None and num_tokens >= max_tokens:
            break
    if not cuts:
        raise DataError(f"{dataset} holds no document of two tokens or more: pass a data set that does.")
    return _passages(cuts, num_tokens / num_bytes)


def _texts(dataset: str, text_column: str | None) -> Iterator[str]:
    if not has_rows(dataset):
        yield "".join(read_text(Path(dataset).expanduser()))
        return
    column = None
    for row in open_rows(dataset):
        column = column or choose_column(dataset, row, text_column)
        if not isinstance(row[column], str | None):
            raise DataError(f"Column {column!r} of {dataset} holds {type(row[column]).__name__}, not text.")
        if row[column]:
            yield row[column]


def _slide(tokens: Int[Tensor, " tokens"], window: int, stride: int) -> Iterator[tuple[Tensor, int]]:
    """Yield windows until all is read, each with the first token that the one before has not judged."""
    stride = min(stride, window)
    count = 1 + max(0, math.ceil((len(tokens) - window) / stride))
    for number in range(count):
        passage = tokens[number * stride : number * stride + window]
        first = max(1, window - stride) if number else 1
        if len(passage) > first:
            yield passage, first


def _passages(cuts: Sequence[tuple[Tensor, int]], tokens_per_byte: float) -> Passages:
    tokens, first = zip(*cuts, strict=True)
    return Passages(tokens, first, tokens_per_byte)
