"""What is read as what: every format by every command, and the table of it in docs/guides/data.md.

``TRANSMLA_DATA=docs/guides/data.md`` writes the table down.
"""

from __future__ import annotations

import gzip
import json
import os
import re
from pathlib import Path

import pyarrow
import pytest
from pyarrow import parquet

from tests.data.files import CHAT, FILES, TEXTS, columns, lines
from tests.data.templates import CHATML
from tests.factory import tiny_tokenizer
from transmla.data.documents import Documents, open_documents
from transmla.data.text import first_tokens
from transmla.errors import DataError
from transmla.evaluate.windows import read_windows
from transmla.finetune.data.documents import read_documents

PAGE = Path(__file__).parents[2] / "docs" / "guides" / "data.md"
COMMANDS = ("convert --calibration", "eval --dataset", "eval --per-document", "finetune --dataset")


@pytest.fixture(scope="module")
def tokenizer():
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = CHATML
    return tokenizer


def read(command, path, tokenizer):
    """What a command makes of a file: rows, chats, one text, or its sentence."""
    name = str(path)
    try:
        documents = Documents(name, tokenizer=tokenizer)
        kind = "one text" if documents.is_text else "chats" if documents.are_chats else "rows"
        if command == "convert --calibration":
            tokens = first_tokens(open_documents(name, tokenizer=tokenizer), tokenizer).tolist()
            found, whole = tokenizer.decode(tokens), "\n\n".join(TEXTS)
        elif command == "eval --dataset":
            windows = read_windows(name, tokenizer, window=3, stride=2, bos="never")
            places = [(number * 2, part.tolist()) for number, part in enumerate(windows.tokens)]
            tokens = [token for start, part in places for token in part[0 if not start else 1 :]]
            found, whole = tokenizer.decode(tokens), "\n\n".join(TEXTS)
        else:
            if command == "eval --per-document":
                windows = read_windows(name, tokenizer, window=400, per_document=True, bos="never")
                parts = [part.tolist() for part in windows.tokens]
            else:
                parts = [list(document.tokens) for document in read_documents(name, tokenizer)]
            around = (tokenizer.bos_token_id, tokenizer.eos_token_id)
            texts = [tokenizer.decode([token for token in part if token not in around]) for part in parts]
            found, whole = "|".join(texts), "\n\n".join(TEXTS) if kind == "one text" else "|".join(filter(None, TEXTS))
    except DataError as error:
        return "refused", str(error)
    if kind == "chats":
        assert CHAT[0]["content"] in found
        assert found.count(CHAT[1]["content"]) == 2
    elif "a row" not in path.parent.name:
        assert found == whole
    return kind, ""


@pytest.fixture(scope="module")
def verdicts(tokenizer, tmp_path_factory):
    found = []
    for what, name, content in FILES:
        path = tmp_path_factory.mktemp("a row" if what.endswith("a row") else "files") / name
        path.write_bytes(content)
        found.append((what, name, path, [read(command, path, tokenizer) for command in COMMANDS]))
    return found


def test_every_command_reads_a_file_as_the_same(verdicts):
    for what, name, _, found in verdicts:
        assert len({kind for kind, _ in found}) == 1, (what, name, found)


def test_what_is_refused_is_named_in_a_sentence(verdicts):
    for what, name, path, found in verdicts:
        for kind, sentence in found:
            if kind == "refused":
                assert str(path) in sentence, (what, sentence)
                assert re.search(r"[a-z:] |pass|name it|save|unpack|load it", sentence)
                assert "Traceback" not in sentence
                assert len(sentence.replace(str(path), name)) < 260


def test_the_page_has_the_table(verdicts):
    rows = ["| a file | named | " + " | ".join(f"`{command}`" for command in COMMANDS) + " |", "|---|---|" + "---|" * 4]
    sentences = []
    for what, name, path, found in verdicts:
        rows.append(f"| {what} | `{name}` | " + " | ".join(kind for kind, _ in found) + " |")
        if found[0][0] == "refused":
            sentences.append(f"- {what} (`{name}`): {found[0][1].replace(str(path), name)}")
    table = "\n".join([*rows, "", "What is refused, and the sentence for it:", "", *sentences])
    begin, end = "<!-- made by tests/data/test_files.py -->\n", "\n<!-- end -->"
    page = PAGE.read_text(encoding="utf-8")
    before, _, rest = page.partition(begin)
    _, _, after = rest.partition(end)
    if os.environ.get("TRANSMLA_DATA"):
        PAGE.write_text(before + begin + table + end + after, encoding="utf-8")
    assert PAGE.read_text(encoding="utf-8") == before + begin + table + end + after


def write(tmp_path, name, content):
    path = tmp_path / name
    path.write_bytes(content)
    return str(path)


@pytest.mark.parametrize(
    ("rows", "wanted", "expected"),
    [
        # The first row has no body: nothing is guessed from it.
        ([{"title": "fox", "body": None}, {"title": "fox", "body": "long"}], None, "one of title, body"),
        ([{"title": None, "body": None}, {"title": None, "body": "long"}], None, ["long"]),
        ([{"id": 1}, {"id": 2, "body": "long"}], None, ["long"]),
        ([{"instruction": "a", "input": "b", "output": "c"}], None, "one of instruction, input, output"),
        ([{"text": "a", "body": "b"}], "body", ["b"]),
        ([{"text": "a"}], "body", "has no column 'body'"),
        ([{"text": ["a"]}], None, "Column 'text' holds a list, not text"),
        ([{"n": 1}], None, "has no column with text or chats; its columns: n"),
    ],
)
def test_columns_are_chosen_by_what_many_rows_hold(tmp_path, rows, wanted, expected):
    path = write(tmp_path, "a.jsonl", lines(rows))
    if isinstance(expected, str):
        with pytest.raises(DataError, match=re.escape(expected)):
            list(Documents(path, text_column=wanted))
    else:
        assert list(Documents(path, text_column=wanted).texts()) == expected


@pytest.mark.parametrize(
    ("name", "content", "place"),
    [
        ("a.jsonl", lines([{"text": "a"}] * 1200) + b'{"text": "b"\n', r"Line 1201 of .*a\.jsonl is not valid JSON"),
        ("a.jsonl", lines([{"text": "a"}] * 1200) + b'{"text": "\xff"}\n', r"Line 1201 of .*a\.jsonl is not UTF-8"),
        ("a.jsonl", lines([{"text": "a"}] * 1200) + b"[1]\n", r"Line 1201 of .*a\.jsonl is a list, and not an object"),
        (
            "a.jsonl",
            lines([{"text": "a"}] * 1200 + [{"text": 3}]),
            r"Line 1201 of .*: Column 'text' holds a number, not",
        ),
        ("a.csv", b"text,n\n" + b"a,1\n" * 1200 + b"a,1,2\n", r"Line 1202 of .*a\.csv has 3 columns; its first line"),
        ("a.csv", b"text,text\na,b\n", r"has two columns 'text'"),
        ("a.json", b'[{"text": "a"}, 3]', r"Row 2 of .*a\.json is a number, and not an object"),
    ],
)
def test_a_row_that_cannot_be_read_is_named(tmp_path, name, content, place):
    with pytest.raises(DataError, match=place):
        list(Documents(write(tmp_path, name, content)))


def test_a_column_that_nobody_asks_for_may_hold_anything(tmp_path):
    rows = [{"text": "a", "note": None}] * 2000 + [{"text": "b", "note": {"x": [1]}}, {"text": "c", "note": "x"}]
    documents = Documents(write(tmp_path, "a.jsonl", lines(rows)))
    assert len(list(documents.texts())) == 2002
    assert documents.reading.unread_columns == ("note",)


@pytest.mark.parametrize("later", [{"title": "b", "body": "long"}, {"title": None, "body": "long"}])
@pytest.mark.parametrize("empty", [{"title": "a", "body": None}, {"title": "a"}])
def test_a_column_with_text_after_any_number_of_rows_is_a_question(tmp_path, empty, later):
    rows = [empty] * 1500 + [later]
    files = {"a.jsonl": lines(rows)} | ({"a.parquet": columns(rows)} if "body" in empty else {})
    for name, content in files.items():
        with pytest.raises(DataError, match=r"1501 of .*'body' holds text as well as 'title'.* one of title, body\."):
            list(Documents(write(tmp_path, name, content)))


def test_a_text_that_was_found_by_what_rows_hold_is_told(tmp_path):
    documents = Documents(write(tmp_path, "a.csv", b"No header here.\nThe second line.\n"))
    assert list(documents.texts()) == ["The second line."]
    assert "the text is taken from 'No header here.', the only column with text" in documents.reading.sentence()


def test_columns_that_turn_up_late_are_told(tmp_path):
    documents = Documents(write(tmp_path, "a.jsonl", lines([{"text": "a"}] * 1200 + [{"text": "b", "note": "x"}])))
    assert len(list(documents)) == 1201
    assert documents.reading.unread_columns == ("note",)


@pytest.mark.parametrize(
    ("header", "expected"),
    [
        ('"text","a;b;c;d"', "long; winter"),
        ("text|n", "long; winter"),
        ("sep=|\ntext|n", "long; winter"),
        ("sep=;\r\ntext;n", "long; winter"),
    ],
)
def test_what_separates_columns_is_found_outside_of_quotes(tmp_path, header, expected):
    delimiter = "," if header[0] == '"' else header[-2]
    content = f'{header}\n"{expected}"{delimiter}3\n'.encode()
    assert list(Documents(write(tmp_path, "a.csv", content), text_column="text").texts()) == [expected]


@pytest.mark.parametrize(
    "content",
    [
        {"data": {"rows": [{"text": "a"}]}},
        {"version": "1", "splits": {"train": [{"text": "a"}]}},
        {"first": {"text": "a"}, "second": {"text": "b"}},
        {"text": [None, "b"]},
        {"columns": ["text"], "data": [["a"], ["b"]]},
        {"text": {"0": "a", "1": "b"}, "id": {"0": 1, "1": 2}},
    ],
)
def test_a_data_set_within_one_object_is_refused_and_its_key_is_named(tmp_path, content):
    for name in ("a.json", "a.jsonl"):
        with pytest.raises(DataError, match=r"is one JSON object with .*'(data|data\.rows|splits\.train|first|text)'"):
            Documents(write(tmp_path, name, json.dumps(content).encode()))


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"text": "a", "entities": [{"start": 0}], "meta": {"tags": ["x", "y"]}}, "a"),
        ({"prompt": "a", "completion": "b", "sources": [{"id": 1}]}, "ab"),
    ],
)
def test_lists_beside_the_text_of_a_single_row_are_not_its_rows(tmp_path, row, expected):
    assert list(Documents(write(tmp_path, "a.jsonl", lines([row]))).texts()) == [expected]


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        ("a.txt", b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "pointer of git-lfs"),
        ("a.parquet", b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "pointer of git-lfs"),
        ("a.csv", b"<!DOCTYPE html>\n<html></html>\n", "a web page"),
        ("a.txt", "winter".encode("utf-16"), "not UTF-8 text, but UTF-16"),
        ("a.jsonl.gz", gzip.compress(lines([{"text": "a"}]).decode().encode("utf-16")), "not UTF-8 text, but UTF-16"),
        ("a.jsonl.gz", gzip.compress(gzip.compress(lines([{"text": "a"}]))), "compressed twice: unpack it"),
        ("a.bin", gzip.compress(columns([{"text": "a"}])), "compressed as a whole: unpack it"),
        ("a.txt", b'["one", "two"]', "holds JSON and is named as text"),
        ("a.jsonl", b'{"text": "\\ud83d"}\n', "Line 1 of .* holds half a character"),
    ],
)
def test_what_is_not_what_it_looks_like_is_refused(tmp_path, name, content, reason):
    with pytest.raises(DataError, match=rf"a\.\w+.* {reason}|{reason}"):
        list(Documents(write(tmp_path, name, content)))


def test_columns_of_parquet_with_one_name_are_refused(tmp_path):
    path = tmp_path / "a.parquet"
    twice = [pyarrow.array(["a"]), pyarrow.array(["b"])]
    parquet.write_table(pyarrow.Table.from_arrays(twice, names=["text", "text"]), path)
    with pytest.raises(DataError, match="has two columns 'text'"):
        Documents(str(path))


TOOL = {"type": "function", "function": {"name": "weather", "parameters": {"type": "object", "properties": {}}}}


@pytest.mark.parametrize(
    ("template", "unread"),
    [
        (CHATML, ("tools", "chat_template_kwargs.thinking")),
        # Neither words between the tags nor texts within them are variables.
        ("Use tools and 'thinking'. {{ 'tools thinking' }}" + CHATML, ("tools", "chat_template_kwargs.thinking")),
        ("{% if tools %}{{ tools | tojson }}{% endif %}" + CHATML, ("chat_template_kwargs.thinking",)),
        ("{% set tools = tools or [] %}{% if thinking is defined %}{% endif %}" + CHATML, ()),
        ({"default": CHATML, "tool_use": "{{ tools }}{{ thinking }}" + CHATML}, ()),
    ],
)
def test_what_a_template_does_not_read_is_told(tokenizer, tmp_path, template, unread):
    own = tiny_tokenizer()
    own.chat_template = template
    rows = [{"messages": CHAT}, {"messages": CHAT, "tools": [TOOL], "chat_template_kwargs": {"thinking": True}}]
    documents = Documents(write(tmp_path, "a.jsonl", lines(rows)), tokenizer=own)
    assert len(list(documents)) == 2
    assert documents.reading.unread_by_template == unread
    sentence = documents.reading.sentence() or ""
    assert ("the chat template does not read " + ", ".join(unread) in sentence) is bool(unread)


@pytest.mark.parametrize(
    ("template", "unread"),
    [
        (CHATML, ()),
        ("{% for m in messages if m.role in ('user', 'assistant') %}{{ m.content }}{% endfor %}", ("system", "tool")),
        ("{% for m in messages if m.role != 'tool' %}{{ m.content | trim | upper | lower }}{% endfor %}", ("tool",)),
        # Each question is written where it is the last.
        ("{{ messages[0].content }}{{ messages[-1].content }}", ()),
        ("{% if messages[-1].role != 'assistant' %}{{ raise_exception('no') }}{% endif %}" + CHATML, ()),
    ],
)
def test_messages_that_a_template_skips_are_told(tmp_path, template, unread):
    own = tiny_tokenizer()
    own.chat_template = template
    chat = [{"role": "system", "content": "brief"}, *CHAT, {"role": "tool", "content": "3"}, *CHAT]
    documents = Documents(write(tmp_path, "a.jsonl", lines([{"messages": CHAT}, {"messages": chat}])), tokenizer=own)
    assert len(list(documents)) == 2
    assert documents.reading.unread_by_template == tuple(f"messages of {role}" for role in unread)


def test_rows_without_text_are_counted_and_told(tmp_path):
    rows = [{"text": "a", "id": 1}, {"text": None, "id": 2}, {"id": 3}, {"text": "", "id": 4}]
    documents = Documents(write(tmp_path, "a.jsonl", lines(rows)))
    assert list(documents.texts()) == ["a", ""]
    assert (documents.reading.num_rows, documents.reading.num_without_text) == (4, 2)
    assert documents.reading.sentence().endswith(
        "a.jsonl: 2 of 4 rows hold nothing in text; the columns id are not read."
    )
