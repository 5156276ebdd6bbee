"""The script runs at small size on a CPU, and what it counts is right."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "scripts" / "benchmarks" / "decoding_8b.py"
SIZES = {
    "num-layers": 2,
    "vocab-size": 301,
    "hidden-size": 48,
    "intermediate-size": 80,
    "num-attention-heads": 6,
    "num-key-value-heads": 2,
    "head-dim": 16,
    "kv-lora-rank": 24,
    "qk-rope-head-dim": 8,
    "num-new-tokens": 4,
    "num-rounds": 1,
    "bandwidth-bytes": 4096,
    "device": "cpu",
}
TINY = [word for name, value in SIZES.items() for word in (f"--{name}", str(value))]
TINY += ["--small", "--contexts", "32", "64", "--batch-sizes", "1", "3"]


@pytest.fixture
def script(monkeypatch, capsys):
    """The script as a fresh module; calling it returns what it prints."""
    spec = importlib.util.spec_from_file_location("decoding_8b", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "decoding_8b", module)
    spec.loader.exec_module(module)

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["decoding_8b.py", *TINY, *arguments])
        module.main()
        return capsys.readouterr().out

    run.module = module
    return run


def test_the_report(script):
    report = json.loads(script("--json", "--memory-gb", "0.01"))
    rows = report["rows"]
    names = ["GQA", "MLA, stock", "MLA, absorbed"]
    assert [row["model"] for row in rows] == names * 4
    assert [(row["context"], row["batch_size"]) for row in rows[::3]] == [(32, 1), (32, 3), (64, 1), (64, 3)]
    for row in rows:
        numbers = 2 * 2 * 16 if row["model"] == "GQA" else 24 + 8
        assert row["cache_bytes"] == row["context"] * row["batch_size"] * 2 * numbers * 4
        assert row["bytes_per_step"] > row["cache_bytes"]
        assert row["fraction_of_bound"] == pytest.approx(row["gigabytes_per_second"] * 1e9 / report["bandwidth"])
        assert row["tokens_per_second"] > 0
        assert row["largest_batch"] > 3
    assert rows[0]["speedup"] == 1.0
    by_name = {row["model"]: row["largest_batch"] for row in rows[-3:]}
    assert by_name["GQA"] < by_name["MLA, absorbed"]


def test_the_table(script):
    lines = script().splitlines()
    assert "GB/s by copying" in lines[0]
    assert len(lines) == 2 + 12
    assert max(map(len, lines[1:])) <= 80


def test_stock_s_cache_can_be_measured(script):
    assert "stock's cache, copied at every step" in script("--stock-cache")


def test_both_models_share_what_is_not_attention(script):
    options = script.module.argparse.Namespace(**script.module.SHAPES["small"], seed=0)
    source, target = script.module.make_models(options, script.module.choose_device("cpu"))
    assert target.lm_head.weight is source.lm_head.weight
    assert target.model.layers[1].mlp is source.model.layers[1].mlp
    assert target.config.kv_lora_rank == 128


@pytest.mark.parametrize(
    ("peaks", "free", "expected"),
    [
        ([(1, 110), (2, 210), (4, 410)], 1000, 9),
        ([(1, 110), (2, 210)], 100, 0),
        ([(1, 110)], 1000, 1),
        ([(1, 110)], 100, 0),
        ([], 1000, 0),
    ],
)
def test_the_largest_batch_that_fits(script, peaks, free, expected):
    assert script.module.largest_batch(peaks, free) == expected


def test_a_context_without_room_is_refused(script, capsys):
    with pytest.raises(SystemExit):
        script("--contexts", "4")
    assert "--contexts must be longer than --num-new-tokens, which is 4." in capsys.readouterr().err
