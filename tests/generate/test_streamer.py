import pytest
import torch

from tests.factory import tiny_tokenizer
from transmla.generate.streamer import TextPieceStreamer

TEXTS = ["The river froze.\n\nNot before Thursday,  and only there.", "naïve café, 冬の川 🦭 and more", "🦭"]


def stream(tokenizer, tokens):
    pieces = []
    streamer = TextPieceStreamer(tokenizer, pieces.append)
    streamer.put(torch.tensor([[5, 6, 7]]))
    for token in tokens:
        streamer.put(torch.tensor([token]))
    streamer.end()
    return pieces, streamer


@pytest.mark.parametrize("text", TEXTS)
def test_the_pieces_are_the_text(text):
    """Byte by byte, where a character takes several tokens."""
    tokenizer = tiny_tokenizer()
    tokens = tokenizer(text, add_special_tokens=False)["input_ids"]
    pieces, streamer = stream(tokenizer, tokens)
    assert "".join(pieces) == text
    assert not any("\ufffd" in piece for piece in pieces)
    assert len(streamer.times) == len(tokens)
    assert streamer.times == sorted(streamer.times)


def test_half_a_character_is_shown_at_the_end():
    tokenizer = tiny_tokenizer()
    tokens = tokenizer("ab 🦭", add_special_tokens=False)["input_ids"][:-1]
    pieces, _ = stream(tokenizer, tokens)
    assert "".join(pieces) == tokenizer.decode(tokens)
    assert "".join(pieces[:-1]) == "ab "


def test_words_come_before_the_end():
    tokenizer = tiny_tokenizer()
    pieces, _ = stream(tokenizer, tokenizer("The miller wrote", add_special_tokens=False)["input_ids"])
    assert len(pieces) > 2


def test_special_tokens_are_not_shown():
    tokenizer = tiny_tokenizer()
    tokens = tokenizer("The book", add_special_tokens=False)["input_ids"]
    pieces, _ = stream(tokenizer, [tokenizer.bos_token_id, *tokens, tokenizer.eos_token_id])
    assert "".join(pieces) == "The book"
