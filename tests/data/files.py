"""Files of data of every format that people have, each small, for the table of what is read as what."""

from __future__ import annotations

import bz2
import csv
import gzip
import io
import json
import lzma
from collections.abc import Iterable, Mapping
from typing import Any

import pyarrow
import zstandard
from pyarrow import parquet

TEXTS = ["The wheel turned.", "", "A long winter came, and it was cold."]
ROWS = [{"id": number, "text": text} for number, text in enumerate(TEXTS)]
CHAT = [{"role": "user", "content": "the wheel"}, {"role": "assistant", "content": "a long winter"}]
CHATS = [{"messages": CHAT}, {"messages": CHAT}]
SHAREGPT = {"conversations": [{"from": "human", "value": "the wheel"}, {"from": "gpt", "value": "a long winter"}]}
COMPLETED = {"prompt": "the wheel", "completion": "a long winter"}


def lines(rows: Iterable[Any]) -> bytes:
    """JSON lines."""
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def table(rows: Iterable[Mapping[str, Any]], delimiter: str = ",") -> bytes:
    """CSV, with a header."""
    kept = list(rows)
    text = io.StringIO()
    writer = csv.DictWriter(text, list(kept[0]), delimiter=delimiter)
    writer.writeheader()
    writer.writerows(kept)
    return text.getvalue().encode()


def columns(rows: list[dict[str, Any]]) -> bytes:
    """Parquet."""
    sink = pyarrow.BufferOutputStream()
    parquet.write_table(pyarrow.Table.from_pylist(rows, None if rows else pyarrow.schema({"text": "string"})), sink)
    return sink.getvalue().to_pybytes()


#: What a file is, its name, and its bytes.
FILES: list[tuple[str, str, bytes]] = [
    ("a text", "a.txt", "\n\n".join(TEXTS).encode()),
    ("a text of any other name", "a.anything", "\n\n".join(TEXTS).encode()),
    ("JSON lines", "a.jsonl", lines(ROWS)),
    ("JSON lines", "a.jsonlines", lines(ROWS)),
    ("JSON lines", "a.ndjson", lines(ROWS)),
    ("JSON lines named .json", "a.json", lines(ROWS)),
    ("JSON lines of chats", "a.jsonl", lines(CHATS)),
    ("JSON lines of ShareGPT's chats", "a.jsonl", lines([SHAREGPT] * 2)),
    ("JSON lines of prompts and completions", "a.jsonl", lines([COMPLETED] * 2)),
    ("JSON lines of texts", "a.jsonl", lines(TEXTS)),
    ("a JSON array of rows", "a.json", json.dumps(ROWS, indent=1).encode()),
    ("a JSON array of texts", "a.json", json.dumps(TEXTS).encode()),
    ("a JSON array named .jsonl", "a.jsonl", json.dumps(ROWS).encode()),
    ("one JSON object with the rows inside", "a.json", json.dumps({"version": 1, "data": ROWS}, indent=1).encode()),
    ("one JSON object with whole columns", "a.json", json.dumps({"text": TEXTS}).encode()),
    (
        "one JSON object with a row under each key",
        "a.json",
        json.dumps({f"id{n}": row for n, row in enumerate(ROWS)}).encode(),
    ),
    ("one JSON object, a row", "a.json", json.dumps(ROWS[0]).encode()),
    ("CSV", "a.csv", table(ROWS)),
    ("CSV with semicolons", "a.csv", table(ROWS, ";")),
    ("CSV after a line that names its separator", "a.csv", b"sep=|\r\n" + table(ROWS, "|")),
    ("CSV with bars", "a.csv", table(ROWS, "|")),
    ("TSV", "a.tsv", table(ROWS, "\t")),
    ("parquet", "a.parquet", columns(ROWS)),
    ("parquet of chats", "a.parquet", columns(CHATS)),
    ("parquet without rows", "a.parquet", columns([])),
    ("parquet of another name", "a.bin", columns(ROWS)),
    ("JSON lines, by gzip", "a.jsonl.gz", gzip.compress(lines(ROWS))),
    ("JSON lines, by gzip, and not named so", "a.jsonl", gzip.compress(lines(ROWS))),
    ("JSON lines, by bzip2", "a.jsonl.bz2", bz2.compress(lines(ROWS))),
    ("JSON lines, by xz", "a.jsonl.xz", lzma.compress(lines(ROWS))),
    ("JSON lines, by zstd", "a.jsonl.zst", zstandard.compress(lines(ROWS))),
    ("CSV, by gzip", "a.csv.gz", gzip.compress(table(ROWS))),
    ("a text, by gzip", "a.txt.gz", gzip.compress("\n\n".join(TEXTS).encode())),
    ("parquet, by gzip", "a.parquet.gz", gzip.compress(columns(ROWS))),
    ("JSON lines named .txt", "a.txt", lines(ROWS)),
    ("a JSON array named .txt", "a.txt", json.dumps(ROWS, indent=1).encode()),
    ("no parquet, and named so", "a.parquet", lines(ROWS)),
    ("an Arrow file", "a.arrow", b"ARROW1\0\0" + bytes(64)),
    ("a zip archive", "a.zip", b"PK\x03\x04" + bytes(64)),
    ("a spreadsheet", "a.xlsx", b"PK\x03\x04" + bytes(64)),
    ("a PDF", "a.pdf", b"%PDF-1.7\n" + bytes(64)),
    ("text in UTF-16", "a.csv", table(ROWS).decode().encode("utf-16")),
    ("a web page, and not named so", "a.csv", b"<!DOCTYPE html>\n<html></html>\n"),
    ("a pointer of git-lfs", "a.parquet", b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n"),
    ("bytes", "a.dat", bytes(range(64))),
    ("nothing", "a.txt", b""),
    ("nothing", "a.jsonl", b""),
    ("half a gzip file", "a.jsonl.gz", gzip.compress(lines(ROWS * 300))[:60]),
]
