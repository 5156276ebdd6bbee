import json
import logging

import datasets
import pytest
import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from transmla.data import documents as documents_module
from transmla.data import text as text_module
from transmla.data.documents import open_documents
from transmla.data.text import consecutive_windows, mixed_windows, sample_windows
from transmla.errors import DataError

TEXT = "".join(f"Line {i}: the quick brown fox, counts {i * i} dogs.\n" + "\n" * (i % 3) for i in range(80))


LLAMA_3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
PRE_TOKENIZERS = {
    "gpt-2": pre_tokenizers.ByteLevel(add_prefix_space=False),
    "llama-3": pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(LLAMA_3), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    ),
}


def train(pre_tokenizer):
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizer
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=320, initial_alphabet=alphabet, special_tokens=["<s>"], show_progress=False
    )
    tokenizer.train_from_iterator([TEXT], trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", model_max_length=16)


@pytest.fixture(scope="module")
def tokenizer():
    return train(PRE_TOKENIZERS["gpt-2"])


@pytest.fixture
def write(tmp_path):
    def write(name, content):
        path = tmp_path / name
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return str(path)

    return write


def json_lines(*rows):
    return "".join(json.dumps(row) + "\n" for row in rows)


@pytest.mark.parametrize("name", ["a.txt", "a.utf8", "a.md", "a.TXT", "a.anything", "a"])
def test_a_text_file_comes_back_whole(write, name):
    assert "".join(open_documents(write(name, "\ufeffGrüße\r\nline two\n\nno end"))) == "Grüße\nline two\n\nno end"


def test_a_long_text_without_lines_is_read_in_parts(write):
    pieces = list(open_documents(write("a.txt", "word " * 50_000)))
    assert "".join(pieces) == "word " * 50_000
    assert max(map(len, pieces)) == documents_module.PIECE_CHARACTERS


@pytest.mark.parametrize("column", ["text", "only"])
def test_rows_are_joined_by_an_empty_line(write, column):
    rows = [{"id": i, column: value} for i, value in enumerate(["one\nline", "", None, "two"])]
    # As GPTQ joins WikiText: an empty row is one, and what is null is none.
    assert "".join(open_documents(write("a.jsonl", json_lines(*rows)))) == "one\nline\n\n\n\ntwo"


def test_json_and_parquet_are_read(write, tmp_path):
    assert "".join(open_documents(write("a.json", json.dumps([{"text": "one"}, {"text": "two"}])))) == "one\n\ntwo"
    path = tmp_path / "a.parquet"
    datasets.Dataset.from_dict({"text": ["one", "two"]}).to_parquet(path)
    assert "".join(open_documents(str(path))) == "one\n\ntwo"


def test_the_named_column_wins(write):
    path = write("a.jsonl", json_lines({"text": "no", "body": "yes"}))
    assert list(open_documents(path, text_column="body")) == ["yes"]


@pytest.mark.parametrize(
    ("spelled", "expected"),
    [
        ("wikitext", ("wikitext", None, "train")),
        ("org/name:config", ("org/name", "config", "train")),
        ("org/name:config:test", ("org/name", "config", "test")),
        ("org/name::test", ("org/name", None, "test")),
    ],
)
def test_a_hub_name_holds_config_and_split(monkeypatch, spelled, expected):
    def load_dataset(path, *, name, split, streaming):
        assert streaming
        assert (path, name, split) == expected
        return datasets.Dataset.from_list([{"text": "from the hub"}])

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    assert list(open_documents(spelled)) == ["from the hub"]


def test_a_hub_that_does_not_answer_is_one_sentence(monkeypatch):
    def load_dataset(*args, **kwargs):
        raise ConnectionError("Couldn't reach\nthe Hub")

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    with pytest.raises(DataError, match=r"^The data set org/name cannot be read: Couldn't reach the Hub"):
        open_documents("org/name")


@pytest.mark.parametrize("dataset", ["absent.txt", "absent.jsonl", "./absent", "/absent/file", "a/b/c", "a:b:c:d"])
def test_an_absent_file_is_not_sought_on_the_hub(tmp_path, monkeypatch, dataset):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(
        DataError, match=r"There is no file .*: pass text .*, JSON lines .*, JSON, CSV, TSV or parquet, or name"
    ):
        open_documents(dataset)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("bad.txt", b"caf\xe9 au lait", r"bad\.txt is not UTF-8 text \(invalid continuation byte\)"),
        ("bad.utf8", bytes(range(128)), r"bad\.utf8 is not a text file: it holds zero bytes"),
        ("empty.txt", "", r"empty\.txt holds no text"),
        ("bad.jsonl", "{not json\n", r"Line 1 of .*bad\.jsonl is not valid JSON \(Expecting .*\): .{not json"),
        ("bad.parquet", "no parquet", r"bad\.parquet is no parquet file: it does not begin as one"),
        ("none.jsonl", json_lines({"a": 1}), r"none\.jsonl has no column with text or chats; its columns: a\."),
        ("two.jsonl", json_lines({"a": "", "b": ""}), r"has no column 'text': pass --text-column, one of a, b\."),
        ("list.jsonl", json_lines({"text": ["a"]}), r"Line 1 of .*list\.jsonl: Column 'text' holds a list, not text"),
    ],
)
def test_what_is_not_text_is_refused_at_once(write, name, content, message, caplog):
    caplog.set_level(logging.CRITICAL, logger="datasets")
    with pytest.raises(DataError, match=message):
        open_documents(write(name, content))


def test_an_absent_column_is_refused(write):
    with pytest.raises(DataError, match=r"has no column 'body': pass --text-column, one of text, id\."):
        open_documents(write("a.jsonl", json_lines({"text": "x", "id": 1})), text_column="body")


def test_a_folder_is_refused(tmp_path):
    with pytest.raises(DataError, match="is a folder: pass a file of it, text"):
        open_documents(str(tmp_path))


@pytest.mark.parametrize("text", [TEXT, TEXT.replace("\n", " ")], ids=["lines", "one line"])
@pytest.mark.parametrize("documents", [lambda text: [text], lambda text: text.splitlines(keepends=True)])
@pytest.mark.parametrize("pre_tokenizer", PRE_TOKENIZERS.values(), ids=PRE_TOKENIZERS)
def test_pieces_give_the_tokens_of_the_whole_text(monkeypatch, pre_tokenizer, text, documents):
    tokenizer = train(pre_tokenizer)
    whole = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    monkeypatch.setattr(text_module, "PIECE_CHARACTERS", 150)
    windows = consecutive_windows(documents(text), tokenizer, window=10)
    assert windows.flatten().tolist() == whole[: len(whole) // 10 * 10]


@pytest.mark.parametrize("text", ["x" * 95, "1\n" * 40, "漢字" * 30])
def test_a_text_without_words_is_cut_all_the_same(monkeypatch, tokenizer, text):
    monkeypatch.setattr(text_module, "PIECE_CHARACTERS", 10)
    windows = consecutive_windows([text], tokenizer, window=1)
    assert tokenizer.decode(windows.flatten()) == text


def test_long_pieces_do_not_warn(tokenizer, caplog):
    tokenizer.deprecation_warnings.clear()
    consecutive_windows([TEXT], tokenizer, window=10)
    assert not caplog.records


@pytest.mark.parametrize(("max_tokens", "num_windows"), [(100, 10), (109, 10), (10, 1), (2, 1)])
def test_max_tokens_are_whole_windows(tokenizer, max_tokens, num_windows):
    every = consecutive_windows([TEXT], tokenizer, window=10)
    windows = consecutive_windows([TEXT], tokenizer, window=10, max_tokens=max_tokens)
    assert torch.equal(windows, every[:num_windows])


def test_a_text_shorter_than_a_window_is_refused(tokenizer):
    with pytest.raises(DataError, match="The text has 3 tokens; one window needs 4: pass more text or lower --window"):
        consecutive_windows(["0 0"], tokenizer, window=4)


def test_samples_are_distinct_windows_of_the_text(tokenizer):
    every = consecutive_windows([TEXT], tokenizer, window=10).tolist()
    sample = sample_windows([TEXT], tokenizer, window=10, num_windows=20, seed=3).tolist()
    places = [every.index(window) for window in sample]
    assert len(set(places)) == 20
    assert places != sorted(places)


def test_several_texts_share_the_windows_out_and_mix(tokenizer):
    texts = [TEXT, TEXT.upper(), TEXT[::-1]]
    every = [consecutive_windows([text], tokenizer, window=10).tolist() for text in texts]
    mixed = mixed_windows([[text] for text in texts], tokenizer, window=10, num_windows=8, seed=3).tolist()
    origin = [next(i for i, windows in enumerate(every) if window in windows) for window in mixed]
    assert [origin.count(i) for i in range(3)] == [3, 3, 2]
    assert origin != sorted(origin)
    assert mixed == mixed_windows([[text] for text in texts], tokenizer, window=10, num_windows=8, seed=3).tolist()


def test_one_text_alone_is_sampled_as_ever(tokenizer):
    mixed = mixed_windows([[TEXT]], tokenizer, window=10, num_windows=8, seed=3)
    assert torch.equal(mixed, sample_windows([TEXT], tokenizer, window=10, num_windows=8, seed=3))


def test_each_text_must_hold_its_share(tokenizer):
    with pytest.raises(DataError, match="; 20 windows are needed"):
        mixed_windows([[TEXT], [TEXT[:300]]], tokenizer, window=10, num_windows=40, seed=3)


def test_the_seed_decides(tokenizer):
    first, again, other = (
        sample_windows([TEXT], tokenizer, window=10, num_windows=20, seed=seed) for seed in (3, 3, 4)
    )
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_the_pool_ends_long_before_an_endless_text(tokenizer):
    read = 0

    def endless():
        nonlocal read
        while True:
            read += len(TEXT)
            yield TEXT

    assert sample_windows(endless(), tokenizer, window=10, num_windows=5, seed=0).shape == (5, 10)
    assert read <= text_module.PIECE_CHARACTERS + 2 * len(TEXT)


def test_too_few_windows_are_refused(tokenizer):
    num_tokens = len(tokenizer(TEXT, add_special_tokens=False, verbose=False)["input_ids"])
    message = (
        rf"The calibration text has {num_tokens} tokens \({num_tokens // 10} windows of 10\); 999 windows are needed: "
        "pass more text or lower --num-windows / --window"
    )
    with pytest.raises(DataError, match=message):
        sample_windows([TEXT], tokenizer, window=10, num_windows=999, seed=0)


def test_as_many_windows_as_a_text_has(tokenizer):
    everything = len(sample_windows([TEXT], tokenizer, window=10, num_windows=999, seed=0, at_least=1))
    assert everything == len(consecutive_windows([TEXT], tokenizer, window=10))
    assert len(sample_windows([TEXT], tokenizer, window=10, num_windows=20, seed=0, at_least=5)) == 20
    with pytest.raises(DataError, match=f"{everything + 1} windows are needed"):
        sample_windows([TEXT], tokenizer, window=10, num_windows=999, seed=0, at_least=everything + 1)
    # Of several texts the shortest decides, so that the shares stay equal.
    short = TEXT[: len(TEXT) // 3]
    few = len(consecutive_windows([short], tokenizer, window=10))
    assert few < everything
    assert len(mixed_windows([[TEXT], [short]], tokenizer, window=10, num_windows=998, seed=0, at_least=2)) == 2 * few
    same = (
        mixed_windows([[TEXT], [short]], tokenizer, window=10, num_windows=8, seed=3, **least)
        for least in ({}, {"at_least": 2})
    )
    assert torch.equal(*same)
