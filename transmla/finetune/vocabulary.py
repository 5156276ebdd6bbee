"""Which tokens a model and its teacher share.

A vocabulary is often padded: models of one family have one tokenizer, and more rows than it has tokens, each in its own
number (151,936 of Qwen2.5 0.5B and 152,064 of 7B, for 151,665 tokens). So tokenizers are compared, and not sizes. What
both have is what a teacher can speak of: both distributions are those over the shared tokens, renormalized.
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
        num_student: rows of the model that learns.
        num_teacher: rows of the teacher.
        excluded: tokens with a row in both that do not mean the same.
    """

    num_student: int
    num_teacher: int
    excluded: tuple[int, ...] = ()

    @property
    def are_all(self) -> bool:
        """Return whether there are no others, on either side."""
        return self.num_student == self.num_teacher and not self.excluded

    def __len__(self) -> int:
        return min(self.num_student, self.num_teacher) - len(self.excluded)

    def pick(self, scores: Float[Tensor, "positions vocab"]) -> Float[Tensor, "positions shared"]:
        """Return the scores of the shared tokens among those of all."""
        scores = scores[:, : min(self.num_student, self.num_teacher)]
        return scores[:, self._numbers().to(scores.device)] if self.excluded else scores

    def numbers_of(self, places: Int[Tensor, "*any"]) -> Int[Tensor, "*any"]:
        """Return the tokens that stand at places among the shared ones."""
        return self._numbers().to(places.device)[places] if self.excluded else places

    def _numbers(self) -> Int[Tensor, " shared"]:
        kept = torch.ones(min(self.num_student, self.num_teacher), dtype=torch.bool)
        kept[list(self.excluded)] = False
        return kept.nonzero().flatten()


def share_tokens(
    student: PreTrainedTokenizerBase, teacher: PreTrainedTokenizerBase, *, num_student: int, num_teacher: int, name: str
) -> SharedTokens:
    """Compare two tokenizers, one token after the other.

    What was added to a tokenizer, such as the marks of a chat, may differ, and is then not shared; the vocabulary that
    it was trained with may not.

    Args:
        student: tokenizer of the model that learns.
        teacher: that of its teacher.
        num_student: rows of the first model.
        num_teacher: rows of the second one.
        name: what the teacher is called.

    Raises:
        CheckpointError: the teacher cannot read what the tokenizer of the other writes.
    """
    here = {number: token for token, number in student.get_vocab().items() if number < num_student}
    there = {number: token for token, number in teacher.get_vocab().items()}
    added = set(student.get_added_vocab().values())
    other = [number for number in sorted(here.keys() | there.keys()) if here.get(number) != there.get(number)]
    for number in other:
        if number in here and number not in added:
            raise CheckpointError(
                f"The teacher {name} has another tokenizer (token {number} is {_quote(there.get(number))} there and "
                f"{_quote(here[number])} here): only a model with the same tokens can teach; name one with --teacher."
            )
    if (beyond := next((number for number in sorted(here) if number >= num_teacher), None)) is not None:
        raise CheckpointError(
            f"The teacher {name} has {num_teacher} embeddings, and none for token {beyond}, {_quote(here[beyond])}, "
            "which the tokenizer here writes: name another teacher with --teacher."
        )
    return SharedTokens(num_student, num_teacher, tuple(n for n in other if n < min(num_student, num_teacher)))


def _quote(token: str | None) -> str:
    return "none" if token is None else repr(token)
