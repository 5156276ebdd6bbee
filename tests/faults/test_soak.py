"""Fifty conversions in a row: neither memory nor open files grow. By hand, ``-m slow``."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

from tests.factory import tiny_checkpoint

_SOAK = """
import gc, json, os, shutil, sys
from pathlib import Path
import torch
from transmla.config import ConvertRequest
from transmla.convert.run import convert
torch.set_num_threads(1)
source, text, output, count = sys.argv[1:4] + [int(sys.argv[4])]
page = os.sysconf("SC_PAGESIZE")
seen = []
for _ in range(count):
    request = ConvertRequest(
        model=source, output_dir=output, kv_ratio=0.5, calibration=text, num_windows=8, num_heldout_windows=2, window=32
    )
    convert(request)
    shutil.rmtree(output)
    gc.collect()
    resident = int(Path("/proc/self/statm").read_text().split()[1]) * page
    seen.append((resident, len(os.listdir("/proc/self/fd"))))
print(json.dumps(seen))
"""


@pytest.fixture
def soak(tmp_path, calibration_text):
    source = tiny_checkpoint(tmp_path / "source", shards=2)

    def soak(count):
        command = [sys.executable, "-c", _SOAK, source, calibration_text, tmp_path / "out", str(count)]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.getcwd()}
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
        return json.loads(done.stdout)

    return soak


@pytest.mark.slow
def test_fifty_in_one_process(soak):
    seen = soak(50)
    print(seen)
    files = {count for _, count in seen[2:]}
    assert len(files) == 1, files
    # The allocator takes some rounds to settle; from then on less than a megabyte a ten conversions.
    assert seen[-1][0] - seen[19][0] < 3e6, seen


@pytest.mark.slow
def test_fifty_fresh_ones(soak):
    peaks = [soak(1)[0] for _ in range(50)]
    print(peaks)
    assert len({files for _, files in peaks}) == 1
    resident = [bytes_ for bytes_, _ in peaks]
    assert max(resident) < 1.05 * min(resident), peaks
