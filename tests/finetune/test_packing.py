"""Documents, conversations, and how they share sequences without seeing each other."""

import json

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM

from tests.factory import TEXT, tiny_checkpoint, tiny_tokenizer
from transmla.data.documents import Documents, open_documents
from transmla.errors import DataError
from transmla.evaluate.windows import read_windows
from transmla.finetune.data.documents import Document, read_documents
from transmla.finetune.data.packing import Counts, PackedDataset, StreamedDataset, pack
from transmla.finetune.distill.student import IGNORE_INDEX

CHATML = (
    "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
# Like some reasoning models': what an earlier answer thought is dropped.
FORGETFUL = (
    "{% for m in messages %}<|{{ m.role }}|>{% if loop.last %}{{ m.content }}{% endif %}\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
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


def sequences(documents, window=8):
    return [row.lay_out() for row in pack(documents, window=window, pad_token=0)]


def test_rows_are_documents_with_an_end(tokenizer, tmp_path):
    path = write_rows(
        tmp_path / "rows.jsonl", [{"text": "The wheel."}, {"text": None}, {"text": ""}, {"text": "The ninth winter."}]
    )
    documents = list(read_documents(path, tokenizer))
    assert [tokenizer.decode(document.tokens) for document in documents] == [
        "<s>The wheel.</s>",
        "<s>The ninth winter.</s>",
    ]
    assert all(all(document.loss_mask) for document in documents)


def test_a_text_that_is_laid_out_already_begins_and_ends_once(tokenizer, tmp_path):
    path = write_rows(tmp_path / "rows.jsonl", [{"text": "<s>The wheel.</s>"}])
    [document] = read_documents(path, tokenizer)
    assert tokenizer.decode(document.tokens) == "<s>The wheel.</s>"


def test_a_text_file_is_one_stream(tokenizer, tmp_path):
    (tmp_path / "text.txt").write_text(TEXT, encoding="utf-8")
    documents = list(read_documents(str(tmp_path / "text.txt"), tokenizer))
    assert [document.document_start for document in documents] == [True] + [False] * (len(documents) - 1)
    joined = [token for document in documents for token in document.tokens]
    assert joined == tokenizer(TEXT)["input_ids"]


def test_only_what_the_assistant_says_is_learnt(tokenizer, tmp_path):
    path = write_rows(tmp_path / "chat.jsonl", [{"messages": CONVERSATION}])
    [document] = read_documents(path, tokenizer)
    learnt = [token for token, learn in zip(document.tokens, document.loss_mask, strict=True) if learn]
    assert tokenizer.decode(learnt) == "The wheel.<|end|>\nThe ninth.<|end|>\n"
    assert tokenizer.decode(document.tokens).startswith("<|system|>Be brief.<|end|>\n<|user|>What")
    assert document.whole


def test_where_earlier_turns_change_each_answer_is_a_document(tokenizer, tmp_path):
    tokenizer.chat_template = FORGETFUL
    path = write_rows(tmp_path / "chat.jsonl", [{"messages": CONVERSATION}])
    documents = list(read_documents(path, tokenizer))
    assert [tokenizer.decode(document.tokens) for document in documents] == [
        "<|system|><|user|>What turned?<|assistant|>The wheel.",
        "<|system|><|user|><|assistant|><|user|>Which winter?<|assistant|>The ninth.",
    ]
    for document, answer in zip(documents, ("The wheel.", "The ninth."), strict=True):
        learnt = [token for token, learn in zip(document.tokens, document.loss_mask, strict=True) if learn]
        assert tokenizer.decode(learnt) == answer


def test_conversations_in_which_nobody_answers_are_counted(tokenizer, tmp_path):
    silent = [CONVERSATION[:2], [{"role": "user", "content": "a"}, {"role": "bot", "content": "b"}]]
    path = write_rows(tmp_path / "chat.jsonl", [{"messages": messages} for messages in (CONVERSATION, *silent)])
    documents = Documents(path, tokenizer=tokenizer)
    assert len(list(read_documents(documents, tokenizer))) == 1
    assert documents.reading.num_without_answer == 2
    assert "2 of 3 conversations have no answer of the assistant to learn" in documents.reading.sentence()


def test_messages_may_have_another_column(tokenizer, tmp_path):
    path = write_rows(tmp_path / "chat.jsonl", [{"talk": CONVERSATION, "id": "a"}])
    [document] = read_documents(path, tokenizer, text_column="talk")
    assert sum(document.loss_mask) < len(document.tokens)


@pytest.mark.parametrize(
    ("template", "row", "message"),
    [
        (None, {"messages": CONVERSATION}, "no chat template"),
        (CHATML, {"messages": [{"speaker": "a"}]}, "has no role"),
        ("{{ raise_exception('only two') }}", {"messages": CONVERSATION}, r"does not take the conversation \(only two"),
        (CHATML, {"text": 3.5}, "holds a number, not text"),
    ],
)
def test_what_is_no_data_is_refused(tokenizer, tmp_path, template, row, message):
    tokenizer.chat_template = template
    path = write_rows(tmp_path / "rows.jsonl", [row])
    with pytest.raises(DataError, match=message):
        list(read_documents(path, tokenizer))


def test_text_fills_sequences_and_positions_begin_anew():
    first, second = sequences(plain(5, 2, 6))
    assert first["input_ids"].tolist() == [2, 3, 4, 5, 6, 7, 8, 9]
    assert first["position_ids"].tolist() == [0, 1, 2, 3, 4, 0, 1, 0]
    assert first["labels"].tolist() == [IGNORE_INDEX, 3, 4, 5, 6, IGNORE_INDEX, 8, IGNORE_INDEX]
    assert second["input_ids"].tolist() == [10, 11, 12, 13, 14, 0, 0, 0]
    assert second["labels"].tolist() == [IGNORE_INDEX, 11, 12, 13, 14, IGNORE_INDEX, IGNORE_INDEX, IGNORE_INDEX]
    assert second["position_ids"].tolist() == [0, 1, 2, 3, 4, 0, 1, 2]


def test_conversations_stay_in_one():
    first, second, third = sequences(plain(5, 5, 11, whole=True))
    assert first["input_ids"].tolist() == [2, 3, 4, 5, 6, 0, 0, 0]
    assert second["input_ids"].tolist() == [7, 8, 9, 10, 11, 0, 0, 0]
    assert third["input_ids"].tolist() == list(range(12, 20))


def test_sequences_without_anything_to_learn_are_left_out():
    documents = [Document([1, 2, 3], [False] * 3, True), Document([4], [True])]
    assert sequences(documents, window=3) == []


@given(st.lists(st.integers(1, 20), max_size=12), st.integers(2, 9))
def test_no_token_of_a_text_is_lost(lengths, window):
    documents = list(plain(*lengths))
    found = sequences(documents, window=window)
    packed = [token for sequence in found for token in sequence["input_ids"].tolist() if token]
    everything = [token for document in documents for token in document.tokens]
    # But for sequences of nothing but first tokens, which have nothing to be predicted from.
    assert set(packed) <= set(everything)
    learnt = sum(int((sequence["labels"] != IGNORE_INDEX).sum()) for sequence in found)
    pieces = sum(int((sequence["position_ids"] == 0).sum()) for sequence in found)
    assert learnt <= len(everything)
    assert learnt >= len(packed) - pieces
    assert all(len(sequence["input_ids"]) == window for sequence in found)


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
        [packed] = sequences(documents, window=32)
        together = model(packed["input_ids"][None], position_ids=packed["position_ids"][None], use_cache=False).logits[
            0
        ]
    torch.testing.assert_close(together, torch.cat(alone), rtol=1e-4, atol=1e-4)


def test_a_dataset_in_memory_gives_back_what_it_was_given():
    rows = list(pack(plain(5, 2, 6), window=8, pad_token=0))
    dataset = PackedDataset(rows, first_index=40)
    assert len(dataset) == 2
    for number, row in enumerate(rows):
        item = dataset[number]
        assert item.pop("index") == 40 + number
        for key, value in row.lay_out().items():
            assert torch.equal(item[key], value)


def test_each_pass_cuts_text_elsewhere():
    dataset = PackedDataset(pack([*plain(20), Document(list(range(22, 42)), [True] * 20)], window=8, pad_token=0))
    beginnings = set()
    for epoch in range(5):
        dataset.set_epoch(epoch)
        items = [dataset[index] for index in range(len(dataset))]
        # A pass shows every token once, and the same ones as the others.
        assert sorted(token for item in items for token in item["input_ids"].tolist()) == list(range(2, 42))
        beginnings.add(int(items[0]["input_ids"][0]))
        for item in items:
            tokens, positions = item["input_ids"], item["position_ids"]
            # A document, the text behind its end, and a sequence begin anew; nothing else does.
            anew = (tokens == 22) | (tokens == 2) | (torch.arange(8) == 0)
            assert torch.equal(positions == 0, anew)
            assert torch.equal(positions[1:][~anew[1:]], positions[:-1][~anew[1:]] + 1)
            assert torch.equal(item["labels"], torch.where(positions > 0, tokens, IGNORE_INDEX))
    assert len(beginnings) == 5
    dataset.set_epoch(0)
    assert dataset[1]["input_ids"].tolist() == list(range(10, 18))


def test_what_must_stay_in_one_piece_does_in_every_pass():
    whole = list(pack([*plain(8, 8), *plain(5, 5, whole=True), *plain(11)], window=8, pad_token=0))
    assert [row.splittable for row in whole] == [True, True, False, False, True]
    dataset = PackedDataset(whole)
    before = [dataset[index] for index in range(len(dataset))]
    dataset.set_epoch(1)
    after = [dataset[index] for index in range(len(dataset))]
    same = [torch.equal(one["input_ids"], two["input_ids"]) for one, two in zip(before, after, strict=True)]
    assert same == [False, False, True, True, False]


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


@pytest.mark.parametrize(("overflow", "expected"), [("cut", (1, 12)), ("drop", (1, 20)), ("split", (1, 0))])
def test_what_does_not_fit_into_a_window_is_counted(overflow, expected):
    short = Document(list(range(10, 16)), [False] * 2 + [True] * 4, whole=True)
    long = Document(list(range(100, 128)), [False] * 8 + [True] * 20, whole=True)
    counts = Counts()
    rows = list(pack([short, long], window=16, pad_token=0, overflow=overflow, counts=counts))
    assert (counts.num_chats, counts.num_learnable) == (2, 24)
    assert (counts.num_long, counts.num_lost) == expected
    seen = [token for row in rows for token, learn in zip(row.tokens, row.loss_mask, strict=True) if learn]
    assert len(seen) == counts.num_learnable - counts.num_lost
    assert all(len(row.tokens) == 16 for row in rows)


@pytest.mark.parametrize("start", [[], [1]], ids=str)
@pytest.mark.parametrize("length", range(17, 50))
def test_a_conversation_that_is_split_is_learnt_to_the_last_token(start, length):
    long = Document(list(range(100, 100 + length)), [False] * 3 + [True] * (length - 3), whole=True)
    rows = list(pack([long], window=16, pad_token=0, start=start, overflow="split"))
    labels = [token for row in rows for token in row.lay_out()["labels"].tolist() if token != IGNORE_INDEX]
    assert labels == list(range(103, 100 + length))


@pytest.mark.parametrize("length", range(14, 34))
def test_the_last_token_of_a_text_is_learnt_after_a_start(length):
    text = Document([1, *range(10, 10 + length)], [True] * (length + 1))
    rows = list(pack([text], window=16, pad_token=0, start=[1]))
    labels = [token for row in rows for token in row.lay_out()["labels"].tolist() if token != IGNORE_INDEX]
    assert labels == list(range(10, 10 + length))


@pytest.mark.parametrize("bos", ["auto", "always", "never", "once"])
@pytest.mark.parametrize(("prompt", "completion"), [("The wheel", " turned."), ("<s>The wheel", " turned.</s>")])
def test_without_a_template_a_prompt_is_given_and_what_completes_it_is_learnt(
    tokenizer, tmp_path, bos, prompt, completion
):
    tokenizer.chat_template = None
    path = write_rows(tmp_path / "rows.jsonl", [{"prompt": prompt, "completion": completion, "id": 3}])
    [document] = read_documents(path, tokenizer, bos=bos)
    whole = tokenizer.decode(document.tokens)
    assert whole == ("" if bos == "never" and prompt[0] != "<" else "<s>") + "The wheel turned.</s>"
    learnt = [token for token, learn in zip(document.tokens, document.loss_mask, strict=True) if learn]
    assert tokenizer.decode(learnt) == " turned.</s>"
    # The other commands read the same.
    assert list(Documents(path, tokenizer=tokenizer).texts()) == [prompt + completion]
    [passage] = read_windows(path, tokenizer, window=64, per_document=True, bos=bos).tokens
    assert tokenizer.decode(passage).removesuffix("</s>") == whole.removesuffix("</s>")
    assert "".join(open_documents(path, tokenizer=tokenizer)) == prompt + completion


def test_a_window_in_which_a_text_goes_on_begins_as_a_text_does():
    text = Document([1, *range(10, 50)], [True] * 41)
    rows = list(pack([text, Document([1, 7, 8], [True] * 3)], window=16, pad_token=0, start=[1]))
    assert all(len(row.tokens) == 16 and row.tokens[0] == 1 for row in rows)
    assert [token for row in rows for token in row.tokens if token >= 10] == list(range(10, 50))
    # What stands in front is given, and what comes after it is learnt.
    for row in rows[1:]:
        labels = row.lay_out()["labels"].tolist()
        assert labels[0] == IGNORE_INDEX
        assert labels[1] == row.tokens[1]
