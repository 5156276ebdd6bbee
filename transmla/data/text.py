"""Text to token windows, without ever holding the text.

A text is one stream, tokenised without special tokens and cut into windows that do not overlap, so a window may cross
from one document into the next. That is how perplexity on WikiText is usually measured, and it keeps every window full:
no padding, no mask. Each window begins with the token that begins a text, where there is one (:mod:`.tokens`).
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence

import torch
from jaxtyping import Int
from torch import Tensor
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from transmla.checkpoint.source import Source
from transmla.data.documents import PIECE_CHARACTERS
from transmla.errors import CheckpointError, DataError

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


def consecutive_windows(
    documents: Iterable[str],
    tokenizer: PreTrainedTokenizerBase,
    *,
    window: int,
    max_tokens: int | None = None,
    start: Sequence[int] = (),
) -> Int[Tensor, "windows window"]:
    """Cut the text from its start into full windows; the shorter tail is dropped.

    ``max_tokens`` stops the reading; it is rounded down to whole windows, but at least one.

    Raises:
        DataError: the text is shorter than one window.
    """
    count = None if max_tokens is None else max(1, max_tokens // window)
    tokens = first_tokens(documents, tokenizer, None if count is None else count * window)
    windows = cut_windows(tokens, window, start)[:count]
    if not len(windows):
        raise DataError(
            f"The text has {len(tokens)} tokens; one window needs {window}: pass more text or lower --window."
        )
    return windows


def sample_windows(
    documents: Iterable[str],
    tokenizer: PreTrainedTokenizerBase,
    *,
    window: int,
    num_windows: int,
    seed: int,
    start: Sequence[int] = (),
    at_least: int | None = None,
) -> Int[Tensor, "windows window"]:
    """Choose distinct windows at random, in random order, so that any part of the result is a sample as well.

    They come from the first ``16 * num_windows`` windows of the text: a huge data set is not read to its end.
    Of a text that has fewer, all are returned where they are ``at_least`` so many.

    Raises:
        DataError: the text has fewer windows than asked for.
    """
    size = POOL_FACTOR * num_windows
    tokens = first_tokens(documents, tokenizer, size * window)
    pool = cut_windows(tokens, window, start)[:size]
    if at_least is not None:
        num_windows = min(num_windows, max(at_least, len(pool)))
    if len(pool) < num_windows:
        raise DataError(
            f"The calibration text has {len(tokens)} tokens ({len(pool)} windows of {window}); {num_windows} windows "
            "are needed: pass more text or lower --num-windows / --window."
        )
    order = torch.randperm(len(pool), generator=torch.Generator().manual_seed(seed))
    return pool[order[:num_windows]]


def mixed_windows(
    texts: Sequence[Iterable[str]],
    tokenizer: PreTrainedTokenizerBase,
    *,
    window: int,
    num_windows: int,
    seed: int,
    start: Sequence[int] = (),
    at_least: int | None = None,
) -> Int[Tensor, "windows window"]:
    """Choose windows from several texts, an equal share from each, in random order.

    Of texts that have fewer than their share, as many are returned as the shortest one has, from each, where those are
    ``at_least`` so many together.

    Raises:
        DataError: a text has fewer windows than its share.
    """
    shares, fewest = _shares(num_windows, len(texts)), _shares(at_least or num_windows, len(texts))
    parts = [
        sample_windows(text, tokenizer, window=window, num_windows=share, seed=seed, start=start, at_least=least)
        for text, share, least in zip(texts, shares, fewest, strict=True)
        if share
    ]
    if any(len(part) < share for part, share in zip(parts, shares, strict=False)):
        # Any part of a sample is one as well.
        parts = [part[: min(map(len, parts))] for part in parts]
    if len(parts) == 1:
        return parts[0]
    chosen = torch.cat(parts)
    return chosen[torch.randperm(len(chosen), generator=torch.Generator().manual_seed(seed))]


def _shares(count: int, parts: int) -> list[int]:
    return [len(range(first, count, parts)) for first in range(parts)]


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
        yield _tokens(piece, tokenizer)


def first_tokens(
    documents: Iterable[str], tokenizer: PreTrainedTokenizerBase, limit: int | None = None
) -> Int[Tensor, " tokens"]:
    """Return the tokens of a text, without special ones, and no more than ``limit``; no more is read than is needed."""
    return TokenizedText(documents, tokenizer, limit).tokens


class TokenizedText:
    """The tokens of a text, and how many of its bytes they are.

    Attributes:
        tokens: without special ones, and no more than were asked for.
    """

    def __init__(self, documents: Iterable[str], tokenizer: PreTrainedTokenizerBase, limit: int | None = None) -> None:
        """Read no more than is needed for ``limit`` tokens."""
        self._tokenizer = tokenizer
        self._pieces: list[tuple[str, int]] = []
        parts, found = [torch.empty(0, dtype=torch.int64)], 0
        for piece in _pieces(documents):
            ids = _tokens(piece, tokenizer)
            parts.append(torch.tensor(ids, dtype=torch.int64))
            self._pieces.append((piece, len(ids)))
            found += len(ids)
            if limit is not None and found >= limit:
                break
        self.tokens: Int[Tensor, " tokens"] = torch.cat(parts)[:limit]

    def num_bytes(self, count: int) -> int:
        """Return how many bytes of the text, in UTF-8, its first ``count`` tokens stand for.

        They are counted in the text itself: what is left of it once its tokens are decoded may be something else, for
        tokenizers drop case, blanks and characters that they do not know. Tokenizers that do not say where a token ends
        get the share of a piece that its tokens are.
        """
        found = 0
        for piece, length in self._pieces:
            if count < length:
                return found + _bytes_before(piece, count, length, self._tokenizer)
            found += len(piece.encode())
            count -= length
        return found


def _bytes_before(piece: str, count: int, length: int, tokenizer: PreTrainedTokenizerBase) -> int:
    if not count:
        return 0
    if not tokenizer.is_fast:
        return round(len(piece.encode()) * count / length)
    offsets = tokenizer(piece, add_special_tokens=False, return_offsets_mapping=True, verbose=False)["offset_mapping"]
    return len(piece[: max(end for _, end in offsets[:count])].encode())


def _tokens(piece: str, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    # Not verbose: a piece is longer than the model's context by intent, and the tokeniser would warn.
    ids: list[int] = tokenizer(piece, add_special_tokens=False, return_attention_mask=False, verbose=False)["input_ids"]
    return ids


def cut_windows(
    tokens: Int[Tensor, " tokens"], window: int, start: Sequence[int] = ()
) -> Int[Tensor, "windows window"]:
    """Cut tokens into windows of one length, each of which begins with ``start``, once."""
    if not start:
        count = len(tokens) // window
        return tokens[: count * window].view(count, window)
    front = torch.tensor(start, dtype=torch.int64)
    windows, place = [torch.empty(0, window, dtype=torch.int64)], 0
    while True:
        there = torch.equal(tokens[place : place + len(front)], front)
        part = tokens[place : place + window - (0 if there else len(front))]
        found = part if there else torch.cat([front, part])
        if len(found) < window:
            return torch.cat(windows)
        windows.append(found.unsqueeze(0))
        place += len(part)
