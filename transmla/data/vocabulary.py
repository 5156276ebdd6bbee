"""Which tokens two models share: one that learns and its teacher, or a source and what was converted from it.

A vocabulary is often padded: models of one family have one tokenizer, and more rows than it has tokens, each in its own
number (151,936 of Qwen2.5 0.5B and 152,064 of 7B, for 151,665 tokens). So tokenizers are compared, and not sizes. What
both have is what they can be compared by: both distributions are those over the shared tokens, renormalized.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from transmla.errors import CheckpointError


@dataclass(frozen=True)
class SharedTokens:
    """The tokens that two vocabularies have in common, in their order.

    Attributes:
        num_here: rows of the model that learns, or of the source.
        num_there: rows of its teacher, or of what is compared with it.
        excluded: tokens with a row in both that do not mean the same.
    """

    num_here: int
    num_there: int
    excluded: tuple[int, ...] = ()

    @property
    def are_all(self) -> bool:
        """Return whether there are no others, on either side."""
        return self.num_here == self.num_there and not self.excluded

    def __len__(self) -> int:
        return min(self.num_here, self.num_there) - len(self.excluded)

    def pick(self, scores: Float[Tensor, "*any vocab"]) -> Float[Tensor, "*any shared"]:
        """Return the scores of the shared tokens among those of all."""
        scores = scores[..., : min(self.num_here, self.num_there)]
        return scores[..., self._numbers().to(scores.device)] if self.excluded else scores

    def numbers_of(self, places: Int[Tensor, "*any"]) -> Int[Tensor, "*any"]:
        """Return the tokens that stand at places among the shared ones."""
        return self._numbers().to(places.device)[places] if self.excluded else places

    def _numbers(self) -> Int[Tensor, " shared"]:
        kept = torch.ones(min(self.num_here, self.num_there), dtype=torch.bool)
        kept[list(self.excluded)] = False
        return kept.nonzero().flatten()


def share_tokens(
    here: PreTrainedTokenizerBase,
    there: PreTrainedTokenizerBase,
    *,
    num_here: int,
    num_there: int,
    who: str,
    advice: str,
) -> SharedTokens:
    """Compare two tokenizers, one token after the other.

    What was added to a tokenizer, such as the marks of a chat, may differ, and is then not shared; the vocabulary that
    it was trained with may not.

    Args:
        here: tokenizer of the model that learns, or of the source: its tokens are what both models read.
        there: that of the other one.
        num_here: rows of the first model.
        num_there: rows of the second one.
        who: the other one, for error messages, as the start of a sentence.
        advice: what to do where it has other tokens, as the end of one.

    Raises:
        CheckpointError: the other one cannot read what the tokenizer here writes.
    """
    known = {number: token for token, number in here.get_vocab().items() if number < num_here}
    others = {number: token for token, number in there.get_vocab().items()}
    added = set(here.get_added_vocab().values())
    unlike = [number for number in sorted(known.keys() | others.keys()) if known.get(number) != others.get(number)]
    for number in unlike:
        if number in known and number not in added:
            raise CheckpointError(
                f"{who} has another tokenizer (token {number} is {_quote(others.get(number))} there and "
                f"{_quote(known[number])} here): {advice}."
            )
    if (beyond := next((number for number in sorted(known) if number >= num_there), None)) is not None:
        raise CheckpointError(
            f"{who} has {num_there} embeddings, and none for token {beyond}, {_quote(known[beyond])}, which the "
            f"tokenizer here writes: {advice}."
        )
    return SharedTokens(num_here, num_there, tuple(n for n in unlike if n < min(num_here, num_there)))


def _quote(token: str | None) -> str:
    return "none" if token is None else repr(token)
