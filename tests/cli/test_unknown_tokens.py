"""A tokenizer with more tokens than its model has rows: the same sentence wherever such a token would be read."""

import json
import re
import shutil

import pytest
from transformers import AutoTokenizer

from tests.factory import TEXT
from transmla.data.synthetic import whole_words

SENTENCE = r"The tokenizer gives token (\d+), but the model has only 401 embeddings\."


@pytest.fixture(scope="module")
def more(exact_pair, tmp_path_factory):
    """A model, its conversion, and texts with a token of which both know nothing."""
    root = tmp_path_factory.mktemp("more")
    tokenizer = AutoTokenizer.from_pretrained(exact_pair[0])
    tokenizer.add_tokens([f"<|extra_{number}|>" for number in range(150)])
    for folder, name in zip(exact_pair, ("source", "mla"), strict=True):
        shutil.copytree(folder, root / name)
        tokenizer.save_pretrained(root / name)
    strange = TEXT.replace("wheel", "<|extra_149|>")
    assert strange != TEXT
    (root / "strange.txt").write_text(strange * 40)
    (root / "late.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in [TEXT] * 60 + [strange]))
    (root / "strange.jsonl").write_text(json.dumps({"query": "The", "answer": "<|extra_149|>"}) + "\n")
    (root / "plain.txt").write_text(TEXT * 40)
    return root


COMMANDS = {
    "convert": "convert source {tmp}/out --kv-ratio 0.5 --calibration strange.txt --num-windows 8 --window 32",
    "eval": "eval source mla --dataset strange.txt --window 32 --no-cache",
    "eval documents": "eval source --dataset late.jsonl --per-document --window 64 --no-cache",
    "eval greedy": "eval source mla --dataset strange.txt --window 32 --greedy-prompts 2 --no-cache",
    "eval tasks": "eval source --tasks strange.jsonl --no-cache",
    "generate": "generate mla <|extra_149|> --no-chat-template",
    "generate chat": "generate mla <|extra_149|>",
    "finetune": "finetune mla {tmp}/out --dataset strange.txt --window 32 --num-eval-windows 2 --teacher none "
    "--max-steps 1",
    "finetune streamed": "finetune mla {tmp}/out --dataset late.jsonl --window 64 --num-eval-windows 2 --teacher none "
    "--max-steps 30 --streaming --per-device-train-batch-size 8",
}


@pytest.mark.parametrize("name", COMMANDS)
def test_a_token_beyond_the_embeddings(name, more, cli, tmp_path, monkeypatch):
    monkeypatch.chdir(more)
    device = ["--device", "cpu"]
    result = cli(*COMMANDS[name].format(tmp=tmp_path).split(), *device, "-q")
    assert result.exit_code == 1, result.stderr
    assert "not expected" not in result.stderr
    found = re.search(SENTENCE, result.stderr)
    assert found, result.stderr
    assert int(found[1]) >= 401
    assert not (tmp_path / "out").exists()


def test_tokens_that_are_only_there_do_no_harm(more, cli, monkeypatch):
    """Neither in plain text, nor where words are drawn from the whole vocabulary."""
    monkeypatch.chdir(more)
    flags = [
        "--dataset",
        "plain.txt",
        "--window",
        "32",
        "--needle-lengths",
        "200",
        "--needle-trials",
        "2",
        "--needle-depths",
        "2",
    ]
    assert cli("eval", "source", "mla", *flags, "--no-cache", "--device", "cpu", "-q").exit_code == 0
    tokenizer = AutoTokenizer.from_pretrained(more / "source")
    assert max(whole_words(tokenizer, vocab_size=401)) < 401


def test_a_token_for_padding_that_is_beyond_is_not_used(more, cli, tmp_path, monkeypatch):
    monkeypatch.chdir(more)
    shutil.copytree("mla", tmp_path / "mla")
    tokenizer = AutoTokenizer.from_pretrained("mla")
    tokenizer.add_special_tokens({"pad_token": "<|pad|>"})
    assert tokenizer.pad_token_id >= 401
    tokenizer.save_pretrained(tmp_path / "mla")
    flags = ("--window", "64", "--num-eval-windows", "2", "--teacher", "none", "--max-steps", "1", "--device", "cpu")
    result = cli("finetune", tmp_path / "mla", tmp_path / "out", "--dataset", "plain.txt", *flags, "-q")
    assert result.exit_code == 0, result.stderr
    assert cli("generate", tmp_path / "mla", "The", "--max-new-tokens", "2", "--device", "cpu").exit_code == 0
