"""Texts that are made, not read: a needle in a haystack, and random words to be copied.

**Needle.** Sentences about nothing, somewhere among them one that gives a number, and at the end the question for it.
The model must say every token of the number. How deep the sentence lies, and how long the text is, are varied.

**Copy.** Random words, and then the same words again: from the second of them on, whoever looks back far enough knows
what comes. This is what induction heads do (Olsson et al., arXiv:2209.11895), and they live on exact positions.

The other kinds are in :mod:`transmla.data.probes`.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase

from transmla.errors import UsageError

_WHO = ("The baker", "A tired clerk", "My neighbour", "The old captain", "Her brother", "Some children", "The gardener")
_WHAT = ("looked at", "talked about", "walked past", "remembered", "painted", "asked for", "wrote down")
_WHICH = ("the grey river", "a broken clock", "the long street", "an empty house", "the first train", "a pair of shoes")
_WHEN = ("in the morning", "before dinner", "on a cold day", "after the rain", "last week", "without a word")
_PLACES = ("Lisbon", "Oslo", "Cairo", "Lima", "Hanoi", "Dublin", "Quito", "Riga", "Accra", "Sofia", "Tunis", "Perth")
_DIGITS = 6


@dataclass(frozen=True)
class RecallPrompt:
    """A text that a model reads, and which of its tokens it must say.

    Attributes:
        tokens: the text.
        answer: how many tokens at its end are judged.
        counts: which of these count; all of them where it is empty.
    """

    tokens: tuple[int, ...]
    answer: int
    counts: tuple[bool, ...] = ()


def needle_prompt(
    tokenizer: PreTrainedTokenizerBase, *, length: int, depth: float, seed: int, start: Sequence[int] = ()
) -> RecallPrompt:
    """Hide a number in a text.

    Args:
        tokenizer: of the models.
        length: tokens of the text, with question and answer.
        depth: where it is hidden: 0 at the start, 1 just before the question.
        seed: of sentences, place and number.
        start: tokens that a text begins with.

    Raises:
        UsageError: there is no room for sentences.
    """
    chance = random.Random(f"needle {seed}")
    place, number = chance.choice(_PLACES), "".join(chance.choice("123456789") for _ in range(_DIGITS))
    # Digits stand apart, so that every tokenizer has several tokens to say, and not one that is rare.
    spelled = " ".join(number)

    def encode(text: str) -> list[int]:
        return tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]

    needle = encode(f" The secret number of {place} is {spelled}.")
    question = encode(f" What is the secret number of {place}? The secret number of {place} is")
    answer = encode(f" {spelled}")
    room = length - len(start) - len(needle) - len(question) - len(answer)
    if room < len(needle):
        raise UsageError(f"{length} tokens have no room for a needle and a haystack: raise --needle-lengths.")
    hay: list[int] = []
    borders = [0]
    while len(hay) < room:
        hay += encode(sentence(chance))
        borders.append(min(len(hay), room))
    # Between two sentences, but for the last one, which is cut where the room ends.
    hidden = min(borders[:-1], key=lambda border: abs(border - depth * room))
    tokens = [*start, *hay[:hidden], *needle, *hay[hidden:room], *question, *answer]
    return RecallPrompt(tuple(tokens), len(answer))


def sentence(chance: random.Random) -> str:
    """Return a sentence about nothing, with a space before it."""
    return f" {' '.join(chance.choice(words) for words in (_WHO, _WHAT, _WHICH, _WHEN))}."


def copy_prompt(words: Sequence[int], *, length: int, seed: int, start: Sequence[int] = ()) -> RecallPrompt:
    """Write random words twice, after what a text begins with; all of the second time but its first must be said."""
    chance = random.Random(f"copy {seed}")
    half = [chance.choice(words) for _ in range((length - len(start)) // 2)]
    if len(half) < 2:
        raise UsageError(f"{length} tokens have no room for two words, twice: raise --needle-lengths.")
    return RecallPrompt((*start, *half, *half), len(half) - 1)


def whole_words(tokenizer: PreTrainedTokenizerBase, *, vocab_size: int) -> list[int]:
    """Return the tokens that are a word of letters with a space before it, or where there are few, all plain ones.

    A tokenizer may have more tokens than the model has rows for.
    """
    texts = tokenizer.batch_decode(
        [[token] for token in range(min(len(tokenizer), vocab_size))], skip_special_tokens=True
    )
    words = [token for token, text in enumerate(texts) if text[:1] == " " and text[1:].isascii() and text[1:].isalpha()]
    plain = [token for token, text in enumerate(texts) if text.strip()]
    return words if len(words) >= 100 else plain
