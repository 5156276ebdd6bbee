"""Where spans of characters lie in tokens: tokenizers with offsets, without them, and with wrong ones."""

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import ByT5Tokenizer, PreTrainedTokenizer, PreTrainedTokenizerFast

from tests.factory import tiny_tokenizer
from transmla.data.spans import encode_spans

PIECES = [*"abcdefghijklmnopqrstuvwxyz <>|/.\n", "ab", "abc", "bcd", "the", " the", "end>", "<|", "xyz ", ">\n", "\n\n"]


class LongestPiece(PreTrainedTokenizer):
    """A slow tokenizer that takes the longest piece that fits, over and over."""

    def __init__(self, **options):
        self.known = {piece: number for number, piece in enumerate(PIECES)}
        super().__init__(**options)

    @property
    def vocab_size(self):
        return len(PIECES)

    def get_vocab(self):
        return dict(self.known)

    def _tokenize(self, text, **options):
        found = []
        while text:
            piece = max((piece for piece in PIECES if text.startswith(piece)), key=len)
            found.append(piece)
            text = text[len(piece) :]
        return found

    def _convert_token_to_id(self, token):
        return self.known[token]

    def _convert_id_to_token(self, index):
        return PIECES[index]


class Lying(PreTrainedTokenizerFast):
    """A fast tokenizer whose offsets are not to be believed."""

    lie = staticmethod(lambda offsets: offsets)

    def __call__(self, text, **options):
        encoded = super().__call__(text, **options)
        if "offset_mapping" in encoded:
            encoded["offset_mapping"] = self.lie(encoded["offset_mapping"])
        return encoded


def spans_of(borders):
    borders = sorted(borders)
    return list(zip(borders[::2], borders[1::2], strict=False))


def expected(begins, spans):
    return [any(begin in range(*span) for span in spans) for begin in begins]


@st.composite
def texts_with_spans(draw, letters):
    text = draw(st.text(letters, max_size=30))
    return text, spans_of(draw(st.lists(st.integers(0, len(text)), max_size=6)))


@settings(deadline=None)
@given(texts_with_spans("abcdthexyzn <>|\n"))
def test_a_slow_tokenizer_whose_tokens_are_known(given_text):
    text, spans = given_text
    tokenizer = LongestPiece()
    tokens, inside = encode_spans(text, spans, tokenizer)
    pieces = tokenizer._tokenize(text)
    assert [PIECES[token] for token in tokens] == pieces
    begins = [sum(map(len, pieces[:number])) for number in range(len(pieces))]
    assert inside == expected(begins, spans)


@settings(deadline=None)
@given(texts_with_spans("aé€😀 \n"))
def test_bytes_belong_to_their_character(given_text):
    text, spans = given_text
    tokens, inside = encode_spans(text, spans, ByT5Tokenizer(extra_ids=0))
    assert bytes(token - 3 for token in tokens).decode() == text
    assert inside == expected([place for place, letter in enumerate(text) for _ in letter.encode()], spans)


WORDS = ["the ", "quick", " fox", "<s>", "</s>", "\n\n", "é", "😀", "  ", "mill", "book."]


@pytest.mark.parametrize("seed", range(20))
def test_a_fast_tokenizer(seed):
    """Byte-level tokens spell the bytes that they stand for: so their beginnings are counted."""
    chooser = random.Random(seed)
    text = "".join(chooser.choices(WORDS, k=30))
    spans = spans_of(chooser.sample(range(len(text) + 1), 6))
    tokenizer = tiny_tokenizer()
    tokens, inside = encode_spans(text, spans, tokenizer)
    owners = [place for place, letter in enumerate(text) for _ in letter.encode()]
    lengths = [len(token) for token in tokenizer.convert_ids_to_tokens(tokens)]
    begins = [owners[sum(lengths[:number])] for number in range(len(lengths))]
    assert inside == expected(begins, spans)


@pytest.mark.parametrize(
    "lie",
    [
        lambda offsets: [(0, 0)] * len(offsets),
        lambda offsets: offsets[::-1],
        lambda offsets: [(begin, begin) for begin, _ in offsets],
        lambda offsets: [(begin * 2, end * 2) for begin, end in offsets],
        lambda offsets: [(begin // 2, end // 2) for begin, end in offsets],
    ],
    ids=["zeros", "backwards", "empty", "twice as far", "half as far"],
)
def test_offsets_that_are_wrong_are_not_believed(lie):
    tokenizer = tiny_tokenizer()
    liar = Lying(tokenizer_object=tokenizer.backend_tokenizer, bos_token="<s>", eos_token="</s>")
    liar.lie = lie
    text = "<s>A mill stood where the river left the hills.</s>It went out on Friday.</s>"
    spans = [(3, 51), (60, len(text))]
    assert encode_spans(text, spans, liar) == encode_spans(text, spans, tokenizer)
