"""More texts that can only be continued by looking back, each of another form than what conversions are fitted on.

**Passage.** A piece of the user's own text, and then the same again: quoting. Only its words are natural; the form is
that of :func:`~transmla.data.synthetic.copy_prompt`.

**Needles.** Several cities have numbers, somewhere among sentences about nothing, and the last words ask for one of
them. One needle can be found by its form; here the city decides (multi-key retrieval of RULER, arXiv:2404.06654).

**JSON.** An object of random keys and values, and then the question for one key. Every entry looks like the one that is
asked for (key-value retrieval of "Lost in the Middle", arXiv:2307.03172).

**Code.** Functions with random names, and a function at the end that calls some of them. From the token on at which a
name can be no other one's, it is determined by the text, and the rest of it must be said.

All are written in pieces, and a piece has the same tokens wherever it stands: what is asked for is what was there,
token by token, whatever the tokenizer makes of the place.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from itertools import chain

from jaxtyping import Int
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from transmla.data.synthetic import RecallPrompt, sentence
from transmla.errors import UsageError

_CITIES = (
    *("Berlin", "Madrid", "Vienna", "Athens", "Prague", "Warsaw", "Geneva", "Naples", "Boston", "Dallas", "Denver"),
    *("Havana", "Bogota", "Nairobi", "Dakar", "Mumbai", "Delhi", "Kyoto", "Seoul", "Manila", "Sydney", "Bergen"),
)
_DIGITS = 5
_MOST_NEEDLES = 8
_MOST_CALLS = 8
_TRIES = 100
_VERBS = ("load", "read", "get", "make", "update", "count", "find", "check")
_BODIES = ("return value * {}", "return value + {}", "return value - {}", "return value // {}")
_CONSONANTS, _VOWELS = "bdfgklmnprstvz", "aeiou"

Encode = Callable[[str], list[int]]


def passage_prompts(
    text: Int[Tensor, " tokens"], *, length: int, count: int, start: Sequence[int] = ()
) -> list[RecallPrompt]:
    """Say passages of a text twice, spread evenly over it; all of the second time but its first token must be said.

    Args:
        text: tokens of it, without special ones.
        length: tokens of what is made, at most.
        count: passages.
        start: tokens that a text begins with.

    Raises:
        UsageError: the text is shorter than a passage.
    """
    half = (length - len(start)) // 2
    if half < 2:
        raise UsageError(f"{length} tokens have no room for a passage, twice: raise --needle-lengths.")
    if len(text) < half:
        raise UsageError(
            f"The first --dataset has {len(text):,} tokens, and a passage is to have {half:,}: pass more text, lower "
            "--needle-lengths, or leave passage out of --probes."
        )
    places = [number * (len(text) - half) // max(1, count - 1) for number in range(count)]
    passages = [text[place : place + half].tolist() for place in places]
    return [RecallPrompt((*start, *passage, *passage), half - 1) for passage in passages]


def needles_prompt(
    tokenizer: PreTrainedTokenizerBase, *, length: int, seed: int, start: Sequence[int] = ()
) -> RecallPrompt:
    """Give up to eight cities a number each, and ask for that of one.

    Args:
        tokenizer: of the models.
        length: tokens of the text, with question and answer.
        seed: of everything that is chosen.
        start: tokens that a text begins with.

    Raises:
        UsageError: there is no room for two cities.
    """
    chance, encode = random.Random(f"needles {seed}"), _encoder(tokenizer)
    cities = chance.sample(_CITIES, _MOST_NEEDLES)
    numbers = [encode(f" {' '.join(chance.choices('123456789', k=_DIGITS))}") for _ in cities]
    needles = [
        [*encode(f" The number of {city} is"), *number, *encode(".")]
        for city, number in zip(cities, numbers, strict=True)
    ]
    questions = [encode(f" Which number does {city} have? The number of {city} is") for city in cities]
    room = length - len(start) - max(map(len, questions)) - max(map(len, numbers))
    # Half of what is left is for other sentences, if two cities leave so much.
    kept = max(2, min(_MOST_NEEDLES, room // 2 // max(map(len, needles))))
    asked = chance.randrange(kept)
    end = [*questions[asked], *numbers[asked]]
    room = length - len(start) - len(end) - sum(map(len, needles[:kept]))
    if room < 0:
        raise _no_room("needles", length)
    pieces = _sentences(chance, encode, room)
    for needle in needles[:kept]:
        # Not before the first, of which the start is cut off.
        pieces.insert(chance.randint(min(1, len(pieces)), len(pieces)), needle)
    return RecallPrompt((*start, *chain.from_iterable(pieces), *end), len(numbers[asked]))


def json_prompt(
    tokenizer: PreTrainedTokenizerBase, *, length: int, seed: int, start: Sequence[int] = ()
) -> RecallPrompt:
    """Write a JSON object, and ask for the value of one of its keys; the arguments are those of `needles_prompt`.

    Raises:
        UsageError: there is no room for two entries, or the tokenizer does not tell keys apart.
    """
    chance, encode = random.Random(f"json {seed}"), _encoder(tokenizer)
    before_key, before_value, after_value, comma = encode('\n "'), encode('": "'), encode('"'), encode(",")
    opening, closing, asking = encode("\n{"), encode('\n}\n\nThe value of "'), encode('" is "')
    room = length - len(start) - len(opening) - len(closing) - len(asking)
    entries: list[tuple[list[int], list[int]]] = []
    written: list[int] = []
    longest = 0
    for key in _distinct(lambda: encode(_word(chance, 3)), "json"):
        value = encode(_word(chance, 4))
        entry = [*before_key, *key, *before_value, *value, *after_value]
        entry = [*comma, *entry] if entries else entry
        longest = max(longest, len(key) + len(value))
        if len(written) + len(entry) + longest > room:
            break
        entries.append((key, value))
        written += entry
    if len(entries) < 2:
        raise _no_room("json", length)
    key, value = chance.choice(entries)
    text = [*opening, *written, *closing, *key, *asking, *value]
    pieces = _sentences(chance, encode, length - len(start) - len(text))
    return RecallPrompt((*start, *chain.from_iterable(pieces), *text), len(value))


def code_prompt(
    tokenizer: PreTrainedTokenizerBase, *, length: int, seed: int, start: Sequence[int] = ()
) -> RecallPrompt:
    """Define functions, and call up to eight of them; the arguments are those of `needles_prompt`.

    Raises:
        UsageError: there is no room for two functions, or the tokenizer does not tell names apart.
    """
    chance, encode = random.Random(f"code {seed}"), _encoder(tokenizer)
    opening, closing, main = encode('"""'), encode('"""'), encode("\n\n\ndef main(total):")
    define, call, called_with = encode("\n\n\ndef"), encode("\n    total +="), encode("(total)")
    room = length - len(start) - len(opening) - len(closing) - len(main)

    def invent() -> list[int]:
        return encode(f" {chance.choice(_VERBS)}_{_word(chance, 2)}_{_word(chance, 2)}")

    names: list[list[int]] = []
    functions: list[int] = []
    longest = 0
    for name in _distinct(invent, "code"):
        body = encode(f"(value):\n    {chance.choice(_BODIES).format(chance.randrange(2, 10))}")
        function = [*define, *name, *body]
        longest = max(longest, len(call) + len(name) + len(called_with))
        if len(functions) + len(function) + min(_MOST_CALLS, len(names) + 1) * longest > room:
            break
        names.append(name)
        functions += function
    if len(names) < 2:
        raise _no_room("code", length)
    calls: list[int] = []
    counts: list[bool] = []
    for name in chance.sample(names, min(_MOST_CALLS, len(names))):
        calls += [*call, *name, *called_with]
        known = _known_after(name, names)
        counts += [False] * (len(call) + known) + [True] * (len(name) - known) + [False] * len(called_with)
    if True not in counts:
        raise _unlike("code")
    text = [*closing, *functions, *main, *calls]
    pieces = _sentences(chance, encode, length - len(start) - len(opening) - len(text))
    counts = counts[counts.index(True) :]
    return RecallPrompt((*start, *opening, *chain.from_iterable(pieces), *text), len(counts), tuple(counts))


def _known_after(name: Sequence[int], names: Sequence[Sequence[int]]) -> int:
    """Return after how many of its tokens a name can be no other one of them."""

    def shared(other: Sequence[int]) -> int:
        pairs = enumerate(zip(name, other, strict=False))
        return next((place for place, (one, two) in pairs if one != two), min(len(name), len(other)))

    return min(len(name), 1 + max(shared(other) for other in names if other != name))


def _distinct(invent: Callable[[], list[int]], kind: str) -> Iterator[list[int]]:
    """Yield what is invented, but nothing twice."""
    seen: set[tuple[int, ...]] = set()
    while True:
        new = next((found for _ in range(_TRIES) if tuple(found := invent()) not in seen), None)
        if new is None:
            raise _unlike(kind)
        seen.add(tuple(new))
        yield new


def _sentences(chance: random.Random, encode: Encode, room: int) -> list[list[int]]:
    """Return sentences about nothing that are ``room`` tokens together; of the first the start is cut off."""
    pieces: list[list[int]] = []
    while room:
        piece = encode(sentence(chance))[-room:]
        pieces.insert(0, piece)
        room -= len(piece)
    return pieces


def _word(chance: random.Random, syllables: int) -> str:
    return "".join(chance.choice(_CONSONANTS) + chance.choice(_VOWELS) for _ in range(syllables))


def _encoder(tokenizer: PreTrainedTokenizerBase) -> Encode:
    def encode(text: str) -> list[int]:
        tokens: list[int] = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        return tokens

    return encode


def _no_room(kind: str, length: int) -> UsageError:
    return UsageError(
        f"{length} tokens have no room for a text of the kind {kind}: raise --needle-lengths, or leave {kind} out of "
        "--probes."
    )


def _unlike(kind: str) -> UsageError:
    return UsageError(
        f"The tokenizer of the models writes different random words with the same tokens: leave {kind} out of --probes."
    )
