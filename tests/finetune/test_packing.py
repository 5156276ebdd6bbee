"""Documents, conversations, and how they share sequences without seeing each other."""

import json

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM

from tests.factory import TEXT, tiny_checkpoint, tiny_tokenizer
from transmla.errors import DataError
from transmla.finetune.documents import Document, read_documents
from transmla.finetune.packing import PackedDataset, StreamedDataset, pack
from transmla.finetune.student import IGNORED

CHATML = (
    "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
# Like some reasoning models': what an earlier answer thought is dropped.
FORGETFUL = "{% for m in messages %}<|{{ m.role }}|>{% if loop.last %}{{ m.content }}{% endif %}\n{% endfor %}"
CONVERSATION = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "What turned?"},
    {"role": "assistant", "content": "The wheel."},
    {"role": "user", "content": "Which winter?"},
    {"role": "assistant", "content": "The ninth."},
]


@pytest.fixture
def tokenizer():
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = CHATML
    return tokenizer


def write_rows(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def plain(*lengths, whole=False):
    start = 2
    for length in lengths:
        yield Document(list(range(start, start + length)), [True] * length, whole)
        start += length


def test_rows_are_documents_with_an_end(tokenizer, tmp_path):
    path = write_rows(tmp_path / "rows.jsonl", [{"text": "The wheel."}, {"text": None}, {"text": "The ninth winter."}])
    documents = list(read_documents(path, tokenizer, window=8))
    assert [tokenizer.decode(document.tokens) for document in documents] == [
        "<s>The wheel.</s>",
        "<s>The ninth winter.</s>",
    ]
    assert all(all(document.learnt) for document in documents)


def test_a_text_file_is_one_stream(tokenizer, tmp_path):
    (tmp_path / "text.txt").write_text(TEXT, encoding="utf-8")
    documents = list(read_documents(str(tmp_path / "text.txt"), tokenizer, window=16))
    assert {len(document.tokens) for document in documents[:-1]} == {16}
    joined = [token for document in documents for token in document.tokens]
    assert joined == tokenizer(TEXT, add_special_tokens=False)["input_ids"]


def test_only_what_the_assistant_says_is_learnt(tokenizer, tmp_path):
    path = write_rows(tmp_path / "chat.jsonl", [{"messages": CONVERSATION}])
    [document] = read_documents(path, tokenizer, window=8)
    learnt = [token for token, learn in zip(document.tokens, document.learnt, strict=True) if learn]
    assert tokenizer.decode(learnt) == "The wheel.<|end|>\nThe ninth.<|end|>\n"
    assert tokenizer.decode(document.tokens).startswith("<|system|>Be brief.<|end|>\n<|user|>What")
    assert document.whole


def test_messages_may_have_another_column(tokenizer, tmp_path):
    path = write_rows(tmp_path / "chat.jsonl", [{"talk": CONVERSATION, "id": "a"}])
    [document] = read_documents(path, tokenizer, window=8, text_column="talk")
    assert sum(document.learnt) < len(document.tokens)


@pytest.mark.parametrize(
    ("template", "row", "message"),
    [
        (None, {"messages": CONVERSATION}, "no chat template"),
        (FORGETFUL, {"messages": CONVERSATION}, "lays out an earlier turn .* differently"),
        (CHATML, {"messages": [{"speaker": "a"}]}, "not of the form"),
        ("{{ raise_exception('only two') }}", {"messages": CONVERSATION}, "does not take a conversation .*only two"),
        (CHATML, {"text": 3.5}, "holds float, neither text nor"),
    ],
)
def test_what_is_no_data_is_refused(tokenizer, tmp_path, template, row, message):
    tokenizer.chat_template = template
    path = write_rows(tmp_path / "rows.jsonl", [row])
    with pytest.raises(DataError, match=message):
        list(read_documents(path, tokenizer, window=8))


def test_text_fills_sequences_and_positions_begin_anew():
    first, second = pack(plain(5, 2, 6), window=8, pad_token=0)
    assert first["input_ids"].tolist() == [2, 3, 4, 5, 6, 7, 8, 9]
    assert first["position_ids"].tolist() == [0, 1, 2, 3, 4, 0, 1, 0]
    assert first["labels"].tolist() == [IGNORED, 3, 4, 5, 6, IGNORED, 8, IGNORED]
    assert second["input_ids"].tolist() == [10, 11, 12, 13, 14, 0, 0, 0]
    assert second["labels"].tolist() == [IGNORED, 11, 12, 13, 14, IGNORED, IGNORED, IGNORED]
    assert second["position_ids"].tolist() == [0, 1, 2, 3, 4, 0, 1, 2]


def test_conversations_stay_in_one():
    first, second, third = pack(plain(5, 5, 11, whole=True), window=8, pad_token=0)
    assert first["input_ids"].tolist() == [2, 3, 4, 5, 6, 0, 0, 0]
    assert second["input_ids"].tolist() == [7, 8, 9, 10, 11, 0, 0, 0]
    assert third["input_ids"].tolist() == list(range(12, 20))


def test_sequences_without_anything_to_learn_are_left_out():
    documents = [Document([1, 2, 3], [False] * 3, True), Document([4], [True])]
    assert list(pack(documents, window=3, pad_token=0)) == []


@given(st.lists(st.integers(1, 20), max_size=12), st.integers(2, 9))
def test_no_token_of_a_text_is_lost(lengths, window):
    documents = list(plain(*lengths))
    sequences = list(pack(documents, window=window, pad_token=0))
    packed = [token for sequence in sequences for token in sequence["input_ids"].tolist() if token]
    everything = [token for document in documents for token in document.tokens]
    # But for sequences of nothing but first tokens, which have nothing to be predicted from.
    assert set(packed) <= set(everything)
    learnt = sum(int((sequence["labels"] != IGNORED).sum()) for sequence in sequences)
    pieces = sum(int((sequence["position_ids"] == 0).sum()) for sequence in sequences)
    assert learnt <= len(everything)
    assert learnt >= len(packed) - pieces
    assert all(len(sequence["input_ids"]) == window for sequence in sequences)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_documents_of_one_sequence_do_not_see_each_other(tmp_path, attention):
    """The losses of packed documents are those of the documents by themselves."""
    folder = tiny_checkpoint(tmp_path / "model")
    model = AutoModelForCausalLM.from_pretrained(folder, attn_implementation=attention).eval()
    documents = list(plain(9, 4, 7, 12))
    alone = []
    with torch.no_grad():
        for document in documents:
            tokens = torch.tensor([document.tokens])
            alone.append(model(tokens).logits[0])
        [packed] = pack(documents, window=32, pad_token=0)
        together = model(packed["input_ids"][None], position_ids=packed["position_ids"][None], use_cache=False).logits[
            0
        ]
    torch.testing.assert_close(together, torch.cat(alone), rtol=1e-4, atol=1e-4)


def test_a_dataset_in_memory_gives_back_what_it_was_given():
    sequences = list(pack(plain(5, 2, 6), window=8, pad_token=0))
    dataset = PackedDataset(sequences, first_index=40)
    assert len(dataset) == 2
    for number, sequence in enumerate(sequences):
        item = dataset[number]
        assert item.pop("index") == 40 + number
        for key, value in sequence.items():
            assert torch.equal(item[key], value)
    assert dataset.num_learnt == 9


def test_a_stream_is_the_same_each_time_and_never_ends():
    sources = [list(pack(plain(*[8] * 3), window=8, pad_token=0)), list(pack(plain(*[8] * 2), window=8, pad_token=0))]
    stream = StreamedDataset(sources, seed=1)
    once, again = (
        [int(sequence["input_ids"][0]) for sequence, _ in zip(stream, range(50), strict=False)] for _ in range(2)
    )
    assert once == again
    assert set(once) == {2, 10, 18}
    other = [int(s["input_ids"][0]) for s, _ in zip(StreamedDataset(sources, seed=2), range(50), strict=False)]
    assert other != once
