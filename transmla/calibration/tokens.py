"""What must hold of tokens before a model reads them: it has a row for each, and a text begins once."""

from __future__ import annotations

from jaxtyping import Int
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from transmla.errors import DataError


def check_known(tokens: Int[Tensor, "*any"], *, vocab_size: int) -> None:
    """Refuse tokens beyond the embeddings of the model that is to read them.

    Raises:
        DataError: the tokenizer has more tokens than the model.
    """
    if tokens.numel() and (largest := int(tokens.max())) >= vocab_size:
        raise DataError(f"The tokenizer gives token {largest}, but the model has only {vocab_size} embeddings.")


def encode_text(text: str, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Return the tokens of a whole text, with those that the tokenizer puts around it.

    What it puts in front is there once, though the text begins with it already, as the output of a chat template does.
    """
    tokens = tokenizer(text, return_attention_mask=False, verbose=False)["input_ids"]
    prefix = _prefix(tokenizer)
    return tokens[len(prefix) :] if prefix and tokens[len(prefix) : 2 * len(prefix)] == prefix else tokens


def _prefix(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Return what a tokenizer puts in front of every text: the token that begins one, or several, or nothing."""
    around, plain = (
        tokenizer("a", add_special_tokens=added, return_attention_mask=False, verbose=False)["input_ids"]
        for added in (True, False)
    )
    starts = range(len(around) - len(plain) + 1)
    return around[: next((start for start in starts if around[start : start + len(plain)] == plain), 0)]
