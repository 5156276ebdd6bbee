"""Where, in tokens, stretches of a text lie, whether a tokenizer says where its tokens begin or not."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

from transformers import PreTrainedTokenizerBase


def encode_spans(
    text: str, spans: Sequence[tuple[int, int]], tokenizer: PreTrainedTokenizerBase
) -> tuple[list[int], list[bool]]:
    """Return the tokens of a text, without special ones around it, and for each whether it begins within a span.

    Args:
        text: all of it.
        spans: of characters, [start, stop), in order, none over another.
        tokenizer: fast or slow.
    """
    tokens, begins = _encode(text, tokenizer)
    if begins is not None:
        return tokens, [any(start <= begin < stop for start, stop in spans) for begin in begins]
    inside = [False] * len(tokens)
    for start, stop in spans:
        first, last = (_tokens_before(text, border, tokens, tokenizer) for border in (start, stop))
        inside[first:last] = [True] * (last - first)
    return tokens, inside


def _encode(text: str, tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], list[int] | None]:
    """Return the tokens of a text, and where each begins if the tokenizer knows."""
    fast = bool(tokenizer.is_fast)
    encoded = tokenizer(
        text, add_special_tokens=False, return_attention_mask=False, return_offsets_mapping=fast, verbose=False
    )
    tokens = list(encoded["input_ids"])
    offsets = encoded["offset_mapping"] if fast else None
    return tokens, [begin for begin, _ in offsets] if offsets is not None and _are_right(offsets, text) else None


def _are_right(offsets: Sequence[Any], text: str) -> bool:
    in_order = all(one[0] <= other[0] and one[1] <= other[1] for one, other in pairwise(offsets))
    # Some tokenizers leave out white space at the end.
    reach = offsets[-1][1] if offsets else 0
    return in_order and len(text.rstrip()) <= reach <= len(text)


def _tokens_before(text: str, border: int, tokens: Sequence[int], tokenizer: PreTrainedTokenizerBase) -> int:
    """Return how many tokens of a text begin before a border.

    A border between tokens is where the text before it, by itself, has the tokens that the whole text begins with. At
    another one, a token lies across: the last border between tokens before it is where that token begins.
    """
    for place in range(border, 0, -1):
        before, _ = _encode(text[:place], tokenizer)
        if before == tokens[: len(before)]:
            return min(len(before) + (place < border), len(tokens))
    return min(1 if border else 0, len(tokens))
