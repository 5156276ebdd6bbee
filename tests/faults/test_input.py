"""Input from the internet, wrong in every way that a generator thinks of: a sentence, no traceback, no hang.

``-m slow`` tries every value for every key; otherwise a few dozen combinations are drawn.
"""

from __future__ import annotations

import json
import os
import shutil
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from tests.factory import tiny_checkpoint
from transmla.checkpoint.reader import CheckpointReader
from transmla.checkpoint.safetensors import read_headers
from transmla.errors import CheckpointError

FAMILIES = ("llama", "qwen2", "mixtral", "phi3")
#: Of a wrong type, absurd, or contradictory to the weights.
WRONG: list[Any] = [None, True, "", "x", "48", [], {}, [1, 2], {"a": 1}, -1, 0, 1, 7, 2**31, 10**12, 10**30, 0.5]
WRONG += [-1.5, float("nan"), float("inf"), 1e308]
ABSENT = "(absent)"
FEW = settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("input")
    return {family: tiny_checkpoint(root / family, family=family, shards=2) for family in FAMILIES}


def keys_of(config: dict[str, Any]) -> list[tuple[str, ...]]:
    """Every key, and those inside the RoPE parameters; others decide nothing that is read here."""
    ignored = {"architectures", "transformers_version", "bos_token_id", "eos_token_id", "pad_token_id"}
    nested = [("rope_parameters", key) for key in config["rope_parameters"]]
    return [(key,) for key in config if key not in ignored] + nested


def changed(config: dict[str, Any], changes: list[tuple[tuple[str, ...], Any]]) -> dict[str, Any]:
    config = json.loads(json.dumps(config))
    for path, value in changes:
        inner = config
        for key in path[:-1]:
            inner = inner.get(key) if isinstance(inner.get(key), dict) else {}
        if value == ABSENT and isinstance(value, str):
            inner.pop(path[-1], None)
        else:
            inner[path[-1]] = value
    return config


def check_sentence(result, *, told: object = "") -> None:
    """The command worked, or said in one line why it did not."""
    assert result.exit_code in (0, 1, 2), told
    if result.exit_code:
        assert result.stderr.startswith("Error: "), (told, result.output)
        assert result.stderr.count("\n") == 1, (told, result.stderr)
        assert "not expected" not in result.stderr, (told, result.stderr)
        assert len(result.stderr) < 2000, (told, result.stderr[:500])


def try_config(cli, folder: Path, config: dict[str, Any], told: object) -> None:
    path = folder / "config.json"
    kept = path.read_bytes()
    try:
        path.write_text(json.dumps(config))
        check_sentence(cli("inspect", folder, "--json"), told=told)
        check_sentence(cli("convert", folder, folder.parent / "out", "--exact", "--dry-run"), told=told)
    finally:
        path.write_bytes(kept)
    assert not (folder.parent / "out").exists()


@FEW
@given(data=st.data())
def test_configs(cli, checkpoints, data):
    folder = checkpoints[data.draw(st.sampled_from(FAMILIES))]
    config = json.loads((folder / "config.json").read_text())
    change = st.tuples(st.sampled_from(keys_of(config)), st.sampled_from([*WRONG, ABSENT]))
    changes = data.draw(st.lists(change, min_size=1, max_size=3))
    try_config(cli, folder, changed(config, changes), changes)


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_every_value_for_every_key(cli, checkpoints, family):
    folder = checkpoints[family]
    config = json.loads((folder / "config.json").read_text())
    failures = []
    for key, value in product(keys_of(config), [*WRONG, ABSENT]):
        try:
            try_config(cli, folder, changed(config, [(key, value)]), (key, value))
        except AssertionError as error:
            failures.append(str(error)[:300])
    assert not failures, "\n".join(failures)


@pytest.fixture(scope="module")
def shard(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("shard") / "model.safetensors"
    tensors = {"a.weight": torch.ones(3, 5), "b": torch.zeros(7, dtype=torch.bfloat16), "c": torch.arange(4)}
    save_file(tensors, path, metadata={"format": "pt"})
    return path


def try_headers(path: Path) -> None:
    """Headers are refused, or every tensor can be read and lies within the file."""
    try:
        headers = read_headers(path)
    except CheckpointError:
        return
    reader = CheckpointReader(path.parent)
    for name, header in headers.items():
        assert header.offset + header.nbytes <= path.stat().st_size
        assert tuple(reader.read([name], finite=False)[name].shape) == header.shape


@FEW
@given(data=st.data())
def test_headers_with_bytes_changed(shard, tmp_path_factory, data):
    content = bytearray(shard.read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    content = content[: data.draw(st.integers(0, len(content)))] if data.draw(st.booleans()) else content
    path = tmp_path_factory.mktemp("changed") / "model.safetensors"
    path.write_bytes(content)
    try_headers(path)


JSON = st.recursive(
    st.sampled_from([None, True, -1, 0, 3, 2**63, 10**30, 1.5, "F32", "F4", "a", "../x"]),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["dtype", "shape", "data_offsets"]), inner)
    ),
    max_leaves=6,
)
ENTRY = st.fixed_dictionaries(
    {
        "dtype": st.sampled_from(["F32", "BF16", "I64", "F8_E8M0", 3]),
        "shape": st.lists(st.integers(-2, 2**40), max_size=3),
        "data_offsets": st.lists(st.integers(-8, 2**62), max_size=3),
    }
)


@FEW
@given(header=st.dictionaries(st.sampled_from(["a", "b", "__metadata__", "../../c"]), ENTRY | JSON) | JSON)
def test_headers_that_lie(tmp_path_factory, header):
    encoded = json.dumps(header).encode()
    path = tmp_path_factory.mktemp("lies") / "model.safetensors"
    path.write_bytes(len(encoded).to_bytes(8, "little") + encoded + bytes(64))
    try_headers(path)


def nested(depth: int) -> str:
    return "[" * depth + "]" * depth


@pytest.mark.parametrize("name", ["config.json", "model.safetensors.index.json", "tokenizer_config.json"])
@pytest.mark.parametrize(
    "content", [nested(200_000), "", "null", "[]", '"x"', "{", "\0", '{"a": ' + nested(99_999) + "}"], ids=range(8)
)
def test_json_that_is_none(cli, checkpoints, tmp_path, name, content):
    folder = shutil.copytree(checkpoints["llama"], tmp_path / "source")
    (folder / name).write_text(content)
    check_sentence(cli("inspect", folder), told=name)
    result = cli("convert", folder, tmp_path / "out", "--exact", "-q")
    check_sentence(result, told=name)
    assert result.exit_code == 1
    assert {path.name for path in tmp_path.iterdir()} == {"source"}


def test_a_header_nested_without_end(tmp_path):
    encoded = b'{"a":' + nested(300_000).encode() + b"}"
    (tmp_path / "model.safetensors").write_bytes(len(encoded).to_bytes(8, "little") + encoded)
    with pytest.raises(CheckpointError, match="not valid safetensors JSON"):
        read_headers(tmp_path / "model.safetensors")


SHARD_NAMES = ["../model.safetensors", "/etc/passwd", "", ".", "..", "a/b", "a\\b", "absent", "\0", "x" * 5000]


@pytest.mark.parametrize("name", [*SHARD_NAMES, 3, None, []], ids=range(13))
def test_indices_that_lead_elsewhere(cli, checkpoints, tmp_path, name):
    folder = shutil.copytree(checkpoints["llama"], tmp_path / "source")
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    index["weight_map"]["model.norm.weight"] = name
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    for result in (cli("inspect", folder), cli("convert", folder, tmp_path / "out", "--exact", "-q")):
        check_sentence(result, told=name)
        assert result.exit_code == 1
    assert {path.name for path in tmp_path.iterdir()} == {"source"}


def test_a_shard_that_is_a_pipe_is_not_waited_for(cli, checkpoints, tmp_path):
    folder = shutil.copytree(checkpoints["llama"], tmp_path / "source")
    shard = next(folder.glob("*.safetensors"))
    shard.unlink()
    os.mkfifo(shard)
    check_sentence(cli("inspect", folder))
    assert cli("convert", folder, tmp_path / "out", "--exact", "-q").exit_code == 1


BOMB = "a: &a [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{new}: &{new} [{', '.join([f'*{old}'] * 9)}]\n" for old, new in zip("abcdefghi", "bcdefghij", strict=True)
)


@pytest.mark.parametrize(
    "recipe",
    [
        BOMB,
        f"calibration: {nested(5000)}",
        "kv_ratio: " + "9" * 5000,
        "kv_ratio: .nan",
        "!!python/object/apply:os.system [echo]",
        "window: 1e400",
        "calibration: " + "x" * 100_000,
        "? [a, b]\n: c",
        "1: 2",
        "engine: {a: b}",
        "\0",
        "%YAML 9.9\n---\na: b",
    ],
    ids=range(12),
)
def test_recipes(cli, checkpoints, tmp_path, recipe):
    (tmp_path / "recipe.yaml").write_text(recipe)
    result = cli("convert", checkpoints["llama"], tmp_path / "out", "--config", tmp_path / "recipe.yaml", "--dry-run")
    check_sentence(result, told=recipe[:80])
    assert result.exit_code in (1, 2)


TEXTS = {
    "empty": b"",
    "spaces": b" \n\t\n" * 1000,
    "binary": bytes(range(256)) * 100,
    "latin": "größer ".encode("latin-1") * 1000,
    "utf-16": ("text " * 1000).encode("utf-16"),
    "surrogates": b"\xed\xa0\x80" * 1000,
}


@pytest.mark.parametrize("suffix", [".txt", ".jsonl", ".json", ".parquet", ".csv"])
@pytest.mark.parametrize("text", TEXTS)
def test_texts_that_are_none(cli, checkpoints, tmp_path, text, suffix):
    path = tmp_path / f"text{suffix}"
    path.write_bytes(TEXTS[text])
    flags = ["--kv-ratio", 0.5, "--num-windows", 2, "--num-heldout-windows", 1, "--window", 16, "-q"]
    result = cli("convert", checkpoints["llama"], tmp_path / "out", *flags, "--calibration", path)
    check_sentence(result, told=(text, suffix))
    # Spaces are tokens, too.
    assert result.exit_code == (0 if text == "spaces" and suffix in (".txt", ".csv") else 1)
    assert (tmp_path / "out").exists() is (result.exit_code == 0)


def test_one_endless_line(cli, checkpoints, tmp_path):
    """No more of it is read than is needed."""
    path = tmp_path / "text.txt"
    with path.open("w") as file:
        for _ in range(300):
            file.write("some words without an end " * 4000)
    flags = ["--kv-ratio", 0.5, "--num-windows", 2, "--num-heldout-windows", 1, "--window", 16, "-q"]
    assert cli("convert", checkpoints["llama"], tmp_path / "out", *flags, "--calibration", path).exit_code == 0
