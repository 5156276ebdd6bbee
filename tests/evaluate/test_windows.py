"""Protocols: what is read at once, and which tokens are judged."""

import json

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.factory import tiny_tokenizer
from transmla.errors import DataError
from transmla.evaluate.windows import ScoredWindows, _slide, read_windows


@pytest.fixture
def file(tmp_path, text):
    (tmp_path / "text.txt").write_text(text)
    return str(tmp_path / "text.txt")


@pytest.fixture
def everything(tokenizer, text):
    return tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]


def test_windows_stand_side_by_side(file, tokenizer, everything, text):
    found = read_windows(file, tokenizer, window=50)
    assert torch.cat(found.tokens).tolist() == everything[: len(everything) // 50 * 50]
    assert {len(tokens) for tokens in found.tokens} == {50}
    assert set(found.first) == {1}
    read = tokenizer.decode(everything[: found.num_tokens])
    assert text.startswith(read)
    assert found.tokens_per_byte == found.num_tokens / len(read.encode())


@pytest.mark.parametrize(("limit", "expected"), [(149, 100), (150, 150), (3, 50)])
def test_reading_stops_after_whole_windows(file, tokenizer, limit, expected):
    assert read_windows(file, tokenizer, window=50, max_tokens=limit).num_tokens == expected


@given(st.integers(2, 70), st.integers(2, 20), st.integers(1, 20))
def test_with_a_stride_every_token_is_judged_once_with_enough_before_it(length, window, stride):
    tokens = torch.arange(length)
    windows = list(_slide(tokens, window, stride))
    judged = [token for piece, first in windows for token in piece[first:].tolist()]
    side_by_side = stride >= window
    left_out = range(0, length, window) if side_by_side else [0]
    assert judged == [token for token in range(length) if token not in left_out]
    for number, (piece, first) in enumerate(windows):
        assert len(piece) <= window
        assert number == 0 or side_by_side or first == max(1, window - stride)


def test_a_stride_reads_the_tail_as_well(file, tokenizer, everything):
    found = read_windows(file, tokenizer, window=50, stride=20)
    assert found.num_positions == len(everything) - 1
    assert found.tokens[1].tolist() == everything[20:70]
    assert found.first[:3] == (1, 30, 30)


def test_documents_are_judged_by_themselves(tmp_path):
    tokenizer = tiny_tokenizer()
    rows = ["The wheel turned.", None, "A long and very wide winter. " * 5, "x"]
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps({"text": row}) + "\n" for row in rows))
    found = read_windows(str(path), tokenizer, window=16, per_document=True)
    documents = [tokenizer(row)["input_ids"] for row in rows if row]
    assert found.tokens[0].tolist() == documents[0]
    # Too long for a window, the second goes on in further ones; each starts anew.
    long = [tokens.tolist() for tokens in found.tokens[1 : 1 + -(-len(documents[1][1:]) // 15)]]
    # Each of them begins as a text does.
    assert {piece[0] for piece in long} == {documents[1][0]} == {tokenizer.bos_token_id}
    assert [token for piece in long for token in piece[1:]] == documents[1][1:]
    assert set(found.first) == {1}
    text_bytes = sum(len(row.encode()) for row in rows if row)
    assert found.tokens_per_byte == found.num_positions / text_bytes


def test_documents_stop_whole(tmp_path):
    tokenizer = tiny_tokenizer()
    path = tmp_path / "rows.jsonl"
    path.write_text('{"text": "The wheel turned."}\n' * 5)
    length = len(tokenizer("The wheel turned.")["input_ids"])
    found = read_windows(str(path), tokenizer, window=99, per_document=True, max_tokens=length + 1)
    assert found.num_tokens == 2 * length


def test_what_is_too_short_is_refused(tmp_path, tokenizer):
    (tmp_path / "short.txt").write_text("a")
    with pytest.raises(DataError, match=r"short.txt has 1 tokens; one window needs 32"):
        read_windows(str(tmp_path / "short.txt"), tokenizer, window=32)
    with pytest.raises(DataError, match="no document of two tokens"):
        read_windows(str(tmp_path / "short.txt"), tokenizer, window=32, per_document=True)


def test_places_and_batches():
    found = ScoredWindows((torch.arange(5), torch.arange(5), torch.arange(3)), (1, 1, 2), 1.0)
    number, before = found.places()
    assert number.tolist() == [0] * 4 + [1] * 4 + [2]
    assert before.tolist() == [1, 2, 3, 4, 1, 2, 3, 4, 2]
    assert [(tuple(batch.shape), first) for batch, first in found.batches(8)] == [((2, 5), 1), ((1, 3), 2)]
    other = ScoredWindows(found.tokens, (1, 2, 2), 1.0)
    assert other.sha256 == found.sha256
    assert other.settings != found.settings
