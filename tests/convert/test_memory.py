"""What a plan says of memory beside what a conversion takes, in a process of its own."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
from transformers import LlamaConfig

from scripts.benchmarks.memory import RUNS, bench
from tests.convert.models import asked
from tests.support.holes import make_holes
from transmla.convert import plan as plan_module

WITHIN = 0.25

# Imported by nobody who has imported torch: a child starts with the memory of the process that it comes from.
MEASURE = """
import resource, subprocess, sys
subprocess.run(sys.argv[1:], check=True, stdout=subprocess.DEVNULL)
print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * (1 if sys.platform == "darwin" else 1024))
"""


def test_an_exact_conversion_takes_what_its_plan_says(tmp_path):
    """As many key/value heads as heads: the queries of one layer are larger than all else, and are held three times."""
    shape = {"hidden_size": 2048, "num_attention_heads": 16, "num_key_value_heads": 16, "vocab_size": 1000}
    make_holes(tmp_path / "source", LlamaConfig(**shape, intermediate_size=2048, num_hidden_layers=1))
    command = [sys.executable, "-m", "transmla", "convert", tmp_path / "source", tmp_path / "out", "--exact", "-q"]
    measured = subprocess.run([sys.executable, "-c", MEASURE, *command], check=True, capture_output=True, text=True)
    plan = json.loads((tmp_path / "out" / "transmla_report.json").read_text())["plan"]
    assert plan["peak_memory_bytes"] == pytest.approx(int(measured.stdout), rel=WITHIN)
    # Without what any conversion takes, too.
    assert plan["peak_memory_bytes"] > 2 * plan["library_memory_bytes"]


@pytest.mark.slow
@pytest.mark.parametrize("name", RUNS)
def test_every_mode_takes_what_its_plan_says(name, tmp_path):
    assert abs(bench(name, tmp_path, threads=1)["off"]) <= WITHIN


@pytest.fixture
def peak(tmp_path, monkeypatch):
    """Plan a conversion of a wide model that is nowhere."""
    shape = {"hidden_size": 2048, "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 64}
    make_holes(tmp_path / "source", LlamaConfig(**shape, intermediate_size=8192, num_hidden_layers=2))
    monkeypatch.setattr(plan_module, "check_free_space", lambda *_: None)

    def peak(*, text="text.txt", **choices):
        request = asked(tmp_path / "source", tmp_path / "out", text, **choices)
        return plan_module.plan_conversion(request).summary.peak_memory_bytes

    return peak


SIZES = {"kv_lora_rank": 256, "qk_rope_head_dim": 64}


@pytest.mark.parametrize(
    ("less", "more"),
    [
        ({}, {"num_windows": 1000}),
        ({"num_windows": 32}, {"num_windows": 32, "batch_size": 512, "window": 512}),
        ({"window": 256}, {"window": 3000}),
        ({"method": "rorope"}, {}),
        ({"compute_dtype": "bfloat16", "num_windows": 600}, {"num_windows": 600}),
        ({"num_windows": 64}, {"num_windows": 64, "q_lora_rank": 1024}),
        ({}, {"num_windows": 128, "kv_lora_rank": 900, "heal_steps": 3, "batch_size": 64}),
    ],
    ids=lambda choices: "-".join(choices),
)
def test_what_takes_more_is_said_to_take_more(peak, less, more):
    assert peak(**{**SIZES, **less}) < peak(**{**SIZES, **more})


def test_exact_layers_need_no_moments(peak):
    assert peak(text=None, exact=True) < peak(text=None, calibration="none", **SIZES) < peak(**SIZES)
