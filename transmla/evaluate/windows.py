"""Text to windows: what a model reads at once, and which of its tokens are judged.

Perplexities differ by how a text is cut, so each protocol that people quote is a way to cut it:

- windows of equal length side by side, as GPTQ's and TransMLA's tables have it;
- windows that advance by a stride less than their length, where only what is new counts, so that every token is judged
  with much before it;
- each document by itself.

Each window begins with the token that begins a text, where the tokenizer puts one (:mod:`transmla.data.tokens`), and
what comes after it is judged; without one the first token of a window is never judged: nothing comes before it.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import groupby

import numpy
import torch
from jaxtyping import Int
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from transmla.config import Bos
from transmla.data.documents import Documents, Reading, with_text
from transmla.data.text import TokenizedText
from transmla.data.tokens import begun, encode_text, text_start
from transmla.errors import DataError, UsageError


@dataclass(frozen=True)
class ScoredWindows:
    """What is read, and from where on in each window it is judged.

    Attributes:
        tokens: one tensor for each window.
        first: index of the first token that is judged, at least 1, for each window.
        tokens_per_byte: of the text, in UTF-8; turns nats a token into bits a byte.
        num_dropped: tokens of the text that are in no window, for they would not fill one.
        reading: what became of the rows of the data set.
        chats: whether these hold chats.
    """

    tokens: tuple[Int[Tensor, " _"], ...]
    first: tuple[int, ...]
    tokens_per_byte: float
    num_dropped: int = 0
    reading: Reading = field(default_factory=lambda: Reading(""))
    chats: bool = False

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
        """Return the tokens of the longest window."""
        return max(map(len, self.tokens))

    def sentence(self) -> str | None:
        """Return what should be known of a text of which not all is read, if anything."""
        if not self.num_dropped:
            return None
        what = "token is" if self.num_dropped == 1 else "tokens are"
        return f"{self.reading.dataset}: {self.num_dropped:,} {what} not read, which would not fill a window."

    @property
    def sha256(self) -> str:
        """Return the hash of all tokens, one window after the other."""
        return hashlib.sha256(torch.cat(self.tokens).numpy().astype("<i8").tobytes()).hexdigest()

    @property
    def settings(self) -> dict[str, object]:
        """Return all that decides what is measured, but for the models."""
        cuts = hashlib.sha256(repr((tuple(map(len, self.tokens)), self.first)).encode()).hexdigest()
        return {"tokens": self.sha256, "cuts": cuts}

    def places(self) -> tuple[numpy.ndarray, numpy.ndarray]:
        """Return, for each judged token in order, the number of its window, and how many tokens are before it."""
        counts = [len(tokens) - first for tokens, first in zip(self.tokens, self.first, strict=True)]
        before = [numpy.arange(first, len(tokens)) for tokens, first in zip(self.tokens, self.first, strict=True)]
        return numpy.repeat(numpy.arange(len(counts)), counts), numpy.concatenate(before)

    def head(self, count: int) -> ScoredWindows:
        """Return the first windows."""
        return replace(self, tokens=self.tokens[:count], first=self.first[:count])

    def starts(self, count: int, *, num_tokens: int) -> Int[Tensor, "windows tokens"]:
        """Return the first tokens of windows that are long enough, spread evenly over the text.

        Raises:
            UsageError: there are not as many.
        """
        long = [tokens for tokens in self.tokens if len(tokens) >= num_tokens]
        if len(long) < count:
            raise UsageError(
                f"The text has {len(long)} windows of {num_tokens} tokens or more, but --greedy-prompts is {count}: "
                "lower it, or --window, or raise --max-tokens."
            )
        return torch.stack([long[number * len(long) // count][:num_tokens] for number in range(count)])

    def batches(self, size: int) -> Iterator[tuple[Int[Tensor, "windows tokens"], int]]:
        """Yield neighbors of one shape, ``size`` at most, with the index of the first token that is judged."""
        alike = groupby(zip(self.tokens, self.first, strict=True), key=lambda piece: (len(piece[0]), piece[1]))
        for (_, first), run in alike:
            stacked = torch.stack([tokens for tokens, _ in run])
            for batch in stacked.split(size):
                yield batch, first


def read_windows(
    dataset: str,
    tokenizer: PreTrainedTokenizerBase,
    *,
    window: int,
    stride: int | None = None,
    per_document: bool = False,
    max_tokens: int | None = None,
    text_column: str | None = None,
    bos: Bos = "auto",
) -> ScoredWindows:
    """Read a text and cut it.

    Args:
        dataset: file, or hub data set.
        tokenizer: of the models.
        window: tokens of a window; those of documents may be shorter.
        stride: tokens by which windows advance; their length by default. A tail shorter than a window is dropped then,
            and read where windows overlap.
        per_document: each row of a data set by itself; a text file is one document.
        max_tokens: stop after this many, rounded to whole windows where they stand side by side, and up to
            whole documents.
        text_column: column that holds the text.
        bos: what windows begin with.

    Raises:
        DataError: it cannot be read, or is too short.
    """
    documents = Documents(dataset, text_column=text_column, tokenizer=tokenizer)
    start = text_start(tokenizer, bos)
    if per_document:
        return _documents(documents, tokenizer, window, stride or window, max_tokens, bos)
    # In front of the whole text only, it is one of the text's own tokens.
    once, start = (start, []) if bos == "once" else ([], start)
    room = window - len(start)
    side_by_side = stride is None or stride >= room
    limit = max_tokens
    if limit is not None:
        limit = max(1, limit // window) * room if side_by_side else max(room, limit)
    text = TokenizedText(with_text(documents), tokenizer, limit)
    tokens = torch.tensor(begun(text.tokens.tolist(), once), dtype=torch.int64)[:limit] if once else text.tokens
    if len(tokens) < room:
        raise DataError(
            f"The text of {dataset} has {len(tokens)} tokens; one window needs {room}: pass more text or lower "
            "--window."
        )
    used = len(tokens) // room * room if side_by_side else len(tokens)
    cuts = list(_slide(tokens[:used], window, stride or window, start))
    of_text = min(used, len(text.tokens))
    dropped = len(tokens) - used
    return _windows(cuts, of_text / text.num_bytes(of_text), dropped, documents)


def _documents(
    documents: Documents,
    tokenizer: PreTrainedTokenizerBase,
    window: int,
    stride: int,
    max_tokens: int | None,
    bos: Bos,
) -> ScoredWindows:
    start = text_start(tokenizer, bos)
    cuts: list[tuple[Tensor, int]] = []
    num_tokens = num_bytes = dropped = 0
    for document in documents.texts():
        if not document:
            continue
        tokens = torch.tensor(encode_text(document, tokenizer, bos), dtype=torch.int64)
        if len(tokens) > 1:
            inner = tokens[len(start) :] if tokens[: len(start)].tolist() == start else tokens
            text, front = (tokens, []) if bos == "once" else (inner, start)
            found = list(_slide(text, window, stride, front))
            # A window of one token, which nothing comes before.
            dropped += _num_windows(len(text), window - len(front), stride) - len(found)
            cuts += found
            num_tokens += len(inner)
            num_bytes += len(document.encode())
        else:
            dropped += len(tokens)
        if max_tokens is not None and num_tokens >= max_tokens:
            break
    if not cuts:
        raise DataError(f"{documents.dataset} holds no document of two tokens or more: pass a data set that does.")
    return _windows(cuts, num_tokens / num_bytes, dropped, documents)


def _slide(
    tokens: Int[Tensor, " tokens"], window: int, stride: int, start: Sequence[int] = ()
) -> Iterator[tuple[Tensor, int]]:
    """Yield windows until all is read, each with the first token that the one before has not judged."""
    room = window - len(start)
    stride, judged = min(stride, room), 0
    for number in range(_num_windows(len(tokens), room, stride)):
        place = number * stride
        part = tokens[place : place + room]
        piece = torch.tensor(begun(part.tolist(), start), dtype=torch.int64) if start else part
        new = place + len(part) - judged
        first = max(1, len(piece) - new)
        judged += new
        if len(piece) > first:
            yield piece, first


def _num_windows(length: int, room: int, stride: int) -> int:
    return 1 + max(0, math.ceil((length - room) / min(stride, room)))


def _windows(
    cuts: Sequence[tuple[Tensor, int]], tokens_per_byte: float, num_dropped: int, documents: Documents
) -> ScoredWindows:
    tokens, first = zip(*cuts, strict=True)
    return ScoredWindows(tokens, first, tokens_per_byte, num_dropped, documents.reading, documents.are_chats)
