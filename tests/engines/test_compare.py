"""Engines as they are released say what stock transformers says; the comparison itself notices when they do not."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

ENGINES = Path(__file__).parent


def save(path: Path, *, off: float = 0.0, token: int = 3) -> None:
    logprobs = np.log(np.full((2, 4), 0.25))
    logprobs[1, 2] += off
    np.savez(path, logprobs=logprobs, greedy=np.array([[1, 2], [token, -1]]), bytes_per_token=64.0, version="1")


@pytest.mark.parametrize(
    ("found", "passed"),
    [({}, True), ({"off": 5e-4}, True), ({"off": 2e-3}, False), ({"off": np.nan}, False), ({"token": 4}, False)],
)
def test_an_engine_that_differs_is_noticed(tmp_path, found, passed):
    save(tmp_path / "transformers.npz")
    save(tmp_path / "engine.npz", **found)
    command = [sys.executable, ENGINES / "compare.py", tmp_path]
    done = subprocess.run([*command, "--json"], capture_output=True, text=True, check=False)
    assert done.returncode == (0 if passed else 1), done.stderr
    rows = json.loads(done.stdout)
    assert rows[f"engine, {tmp_path.name}"]["passed"] is passed
    assert rows[f"transformers, {tmp_path.name}"]["passed"] is True
    table = subprocess.run(command, capture_output=True, text=True, check=False)
    assert table.returncode == done.returncode
    assert ("DIFFERS" in table.stdout) is not passed


def test_an_unknown_engine_is_refused():
    done = subprocess.run([ENGINES / "check.sh", "onnx"], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "Unknown engine onnx; known: llama.cpp, mlx" in done.stderr


@pytest.mark.slow
def test_llama_cpp_and_mlx_say_what_transformers_says(tmp_path):
    done = subprocess.run(
        [ENGINES / "check.sh", "llama.cpp", "mlx"],
        env={**os.environ, "OUTPUT_DIR": str(tmp_path)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "llama.cpp" in done.stdout
    assert "mlx" in done.stdout
