"""Text to tokens, by one rule on the token that begins a text, and what must hold of tokens before a model reads them.

The rule (``--bos``): where the tokenizer puts a token in front of every text, as those of Llama and Mistral do, a model
has never seen a text without it, and much of its attention goes there. So each window begins with it, wherever windows
are read: in calibration, healing, distillation and evaluation alike. Qwen and SmolLM2 have none.
"""

from __future__ import annotations

from collections.abc import Sequence

from jaxtyping import Int
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from transmla.config import Bos
from transmla.errors import DataError, UsageError


def check_characters(text: str) -> None:
    """Refuse halves of characters, which JSON can write down and no tokenizer can read.

    Raises:
        DataError: there is one.
    """
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise DataError(
            f"The text holds half a character, {text[error.start]!r}, which is no Unicode text: leave it out."
        ) from None


def check_known(tokens: Int[Tensor, "*any"], *, vocab_size: int) -> None:
    """Refuse tokens beyond the embeddings of the model that is to read them.

    Raises:
        DataError: the tokenizer has more tokens than the model.
    """
    if tokens.numel() and (largest := int(tokens.max())) >= vocab_size:
        raise DataError(f"The tokenizer gives token {largest}, but the model has only {vocab_size} embeddings.")


def text_start(tokenizer: PreTrainedTokenizerBase, bos: Bos = "auto") -> list[int]:
    """Return the tokens that each text, and each window, begins with.

    Raises:
        UsageError: one is asked for that the tokenizer does not have.
    """
    return _start(_prefix(tokenizer), tokenizer, bos)


def _start(own: list[int], tokenizer: PreTrainedTokenizerBase, bos: Bos) -> list[int]:
    if bos == "never":
        return []
    if own:
        return own
    if bos in ("auto", "once"):
        return []
    if tokenizer.bos_token_id is None:
        raise UsageError("--bos always needs a tokenizer with a BOS token, and this one has none: pass --bos auto.")
    return [int(tokenizer.bos_token_id)]


def encode_text(text: str, tokenizer: PreTrainedTokenizerBase, bos: Bos = "auto") -> list[int]:
    """Return the tokens of a whole text, with those that the tokenizer puts around it.

    What stands in front is there once, though the text begins with it already, as the output of a chat template does.
    """
    tokens: list[int] = tokenizer(text, return_attention_mask=False, verbose=False)["input_ids"]
    own = _prefix(tokenizer)
    return begun(tokens[len(own) :], _start(own, tokenizer, bos))


def begun(tokens: Sequence[int], start: Sequence[int]) -> list[int]:
    """Return the tokens of a text, or of a part of one, after ``start``, which may stand there already."""
    return [*([] if tokens[: len(start)] == start else start), *tokens]


def _prefix(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Return what a tokenizer puts in front of every text: the token that begins one, or several, or nothing."""
    around, plain = (
        tokenizer("a", add_special_tokens=added, return_attention_mask=False, verbose=False)["input_ids"]
        for added in (True, False)
    )
    starts = range(len(around) - len(plain) + 1)
    return around[: next((start for start in starts if around[start : start + len(plain)] == plain), 0)]
