"""Text to token windows, without ever holding the text.

A text file is one stream; the rows of a data set are joined by an empty line into one stream. The stream is tokenised
without special tokens and cut into windows that do not overlap, so a window may cross from one document into the next.
That is how perplexity on WikiText is usually measured, and it keeps every window full: no padding, no mask.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from transmla.calibration.rows import has_rows, open_rows
from transmla.checkpoint.source import Source
from transmla.errors import CheckpointError, DataError

PIECE_CHARACTERS = 100_000
POOL_FACTOR = 16

_WORD_BORDER = re.compile(r"(?<=[^\W\d_])(?= [^\W\d_])")


def load_tokenizer(model: Source) -> PreTrainedTokenizerBase:
    """Load the tokeniser that lies beside the weights.

    Raises:
        CheckpointError: there is none, or it cannot be read.
    """
    try:
        return AutoTokenizer.from_pretrained(model.folder, trust_remote_code=False)
    except Exception as error:  # transformers fails in as many ways as there are tokenizers
        reason = " ".join(str(error).split())
        raise CheckpointError(f"The tokenizer of {model.name} cannot be loaded: {reason}") from error


def open_documents(dataset: str, *, text_column: str | None = None) -> Iterator[str]:
    """Open a text, JSON lines, JSON or parquet file, or a hub data set ``name[:config[:split]]``.

    The first piece is read before this returns, so that what cannot be read fails before the work starts.

    Returns:
        Pieces of text; joined as they are, they make the whole text.

    Raises:
        DataError: nothing there, not readable, not text, or no column to take the text from.
    """
    pieces = _rows(dataset, text_column) if has_rows(dataset) else read_text(Path(dataset).expanduser())
    first = next(pieces, None)
    if first is None:
        raise DataError(f"{dataset} holds no text: pass a data set that does.")
    return chain([first], pieces)


def consecutive_windows(
    documents: Iterable[str], tokenizer: PreTrainedTokenizerBase, *, window: int, max_tokens: int | None = None
) -> Int[Tensor, "windows window"]:
    """Cut the text from its start into full windows; the shorter tail is dropped.

    ``max_tokens`` stops the reading; it is rounded down to whole windows, but at least one.

    Raises:
        DataError: the text is shorter than one window.
    """
    limit = None if max_tokens is None else max(1, max_tokens // window) * window
    tokens = first_tokens(documents, tokenizer, limit)
    if len(tokens) < window:
        raise DataError(
            f"The text has {len(tokens)} tokens; one window needs {window}: pass more text or lower --window."
        )
    return _cut_windows(tokens, window)


def sample_windows(
    documents: Iterable[str], tokenizer: PreTrainedTokenizerBase, *, window: int, num_windows: int, seed: int
) -> Int[Tensor, "windows window"]:
    """Choose distinct windows at random, in random order, so that any part of the result is a sample as well.

    They come from the first ``16 * num_windows`` windows of the text: a huge data set is not read to its end.

    Raises:
        DataError: the text has fewer windows than asked for.
    """
    tokens = first_tokens(documents, tokenizer, POOL_FACTOR * num_windows * window)
    pool = _cut_windows(tokens, window)
    if len(pool) < num_windows:
        raise DataError(
            f"The calibration text has {len(tokens)} tokens ({len(pool)} windows of {window}); {num_windows} windows "
            "are needed: pass more text or lower --num-windows / --window."
        )
    order = torch.randperm(len(pool), generator=torch.Generator().manual_seed(seed))
    return pool[order[:num_windows]]


def mixed_windows(
    texts: Sequence[Iterable[str]], tokenizer: PreTrainedTokenizerBase, *, window: int, num_windows: int, seed: int
) -> Int[Tensor, "windows window"]:
    """Choose windows from several texts, an equal share from each, in random order.

    Raises:
        DataError: a text has fewer windows than its share.
    """
    shares = [len(range(start, num_windows, len(texts))) for start in range(len(texts))]
    parts = [
        sample_windows(text, tokenizer, window=window, num_windows=share, seed=seed)
        for text, share in zip(texts, shares, strict=True)
        if share
    ]
    if len(parts) == 1:
        return parts[0]
    chosen = torch.cat(parts)
    return chosen[torch.randperm(len(chosen), generator=torch.Generator().manual_seed(seed))]


def read_text(path: Path) -> Iterator[str]:
    """Yield a text file piece by piece.

    Raises:
        DataError: it cannot be read, or is not UTF-8 text.
    """
    # Read by length, not by line: the data set library's text reader would hold a text without line ends at once.
    try:
        with path.open(encoding="utf-8-sig") as file:
            while piece := file.read(PIECE_CHARACTERS):
                if "\0" in piece:
                    raise DataError(f"{path} is not a text file: it holds zero bytes.")
                yield piece
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not UTF-8 text ({error.reason}): convert it, or name another file.") from None
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror or error}.") from None


def _rows(dataset: str, text_column: str | None) -> Iterator[str]:
    column, separator = None, ""
    for row in open_rows(dataset):
        column = column or choose_column(dataset, row, text_column)
        text = row[column]
        if not isinstance(text, str | None):
            raise DataError(f"Column {column!r} of {dataset} holds {type(text).__name__}, not text.")
        if text:
            yield separator + text
            separator = "\n\n"


def choose_column(dataset: str, row: Mapping[str, Any], wanted: str | None) -> str:
    """Return the column that holds the text: the one that is wanted, ``text``, or the only one with text.

    Raises:
        DataError: there is none.
    """
    strings = [name for name, value in row.items() if isinstance(value, str)]
    if wanted is None and "text" not in row and len(strings) == 1:
        return strings[0]
    column = wanted or "text"
    if column in row:
        return column
    raise DataError(f"{dataset} has no column {column!r}: pass --text-column, one of {', '.join(strings or row)}.")


def _pieces(documents: Iterable[str]) -> Iterator[str]:
    """Regroup text into pieces of bounded length that tokenise as the whole text would.

    A cut changes the tokens wherever the tokeniser would have read across it: inside a word, but also among line ends,
    which some take one by one, some together, and some with the full stop before them. So lines are joined, not
    tokenised one by one, and what is too long is cut between two words, before the space that goes with the second.
    """
    held = ""
    for document in documents:
        held += document
        start = 0
        while len(held) - start > PIECE_CHARACTERS:
            end = _border(held, start, start + PIECE_CHARACTERS)
            yield held[start:end]
            start = end
        held = held[start:]
    yield held


def _border(text: str, start: int, stop: int) -> int:
    between_words = [match.start() for match in _WORD_BORDER.finditer(text, start + 1, stop)]
    if between_words:
        return between_words[-1]
    return text.rfind("\n", start, stop) + 1 or stop


def token_stream(documents: Iterable[str], tokenizer: PreTrainedTokenizerBase) -> Iterator[list[int]]:
    """Yield the tokens of a whole text, without special ones, some at a time."""
    for piece in _pieces(documents):
        # Not verbose: a piece is longer than the model's context by intent, and the tokeniser would warn.
        yield tokenizer(piece, add_special_tokens=False, return_attention_mask=False, verbose=False)["input_ids"]


def first_tokens(
    documents: Iterable[str], tokenizer: PreTrainedTokenizerBase, limit: int | None = None
) -> Int[Tensor, " tokens"]:
    """Return the tokens of a text, without special ones, and no more than ``limit``; no more is read than is needed."""
    parts, found = [torch.empty(0, dtype=torch.int64)], 0
    for ids in token_stream(documents, tokenizer):
        parts.append(torch.tensor(ids, dtype=torch.int64))
        found += len(ids)
        if limit is not None and found >= limit:
            break
    return torch.cat(parts)[:limit]


def _cut_windows(tokens: Int[Tensor, " tokens"], window: int) -> Int[Tensor, "windows window"]:
    num_windows = len(tokens) // window
    return tokens[: num_windows * window].view(num_windows, window)
