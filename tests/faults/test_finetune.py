"""A training that is hurt leaves a whole output or none, and --resume ends with the same weights."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest

from tests.factory import tiny_checkpoint
from tests.faults.conftest import Bench, Forks, boundaries, contents

SHORT = "--window 32 --num-eval-windows 4 --per-device-train-batch-size 4 --learning-rate 1e-3 --logging-steps 2 -q"


def same(found: dict, whole: dict) -> bool:
    """The same bytes, but for the times in the report, and in the card what it says of the folder."""

    def timeless(report: dict) -> dict:
        points = {key: [{**point, "seconds": 0} for point in report[key]] for key in ("heldout", "training")}
        return {**report, **points}

    name = "transmla_finetune.json"
    return {**found, name: timeless(found[name])} == {**whole, name: timeless(whole[name])}


@pytest.fixture(scope="module")
def bench(forks: Forks, cli, tmp_path_factory, calibration_text) -> Bench:
    folder = tmp_path_factory.mktemp("faults")
    source = tiny_checkpoint(folder / "source")
    assert cli("convert", source, folder / "mla", "--exact", "-q").exit_code == 0
    root = tmp_path_factory.mktemp("root")
    output = root / "out"
    arguments = ["finetune", folder / "mla", output, "--dataset", calibration_text, *SHORT.split()]
    arguments += ["--max-steps", 4, "--eval-steps", 2]
    done = forks.run(root, arguments)
    assert done.code == 0, done.stderr
    bench = Bench(forks, root, output, arguments, contents(output), done.names, same=same)
    bench.clean()
    return bench


@pytest.fixture(autouse=True)
def emptied(bench):
    yield
    bench.clean()


def checkpoints(bench: Bench) -> list[Path]:
    return sorted((bench.root / ".out.partial" / "work").glob("checkpoint-*"))


@pytest.mark.parametrize("chosen", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_killed_at_the_boundaries(bench, cli, chosen):
    for at in boundaries(len(bench.boundaries), few=7, chosen=chosen):
        outcome = bench.hurt({"kind": "SIGKILL", "at": at})
        assert outcome.code == -9, (at, outcome)
        for checkpoint in checkpoints(bench):
            # A checkpoint is there as a whole, or not at all.
            found = json.loads(cli("verify", checkpoint, "--json", "-q").stdout)
            assert {check["outcome"] for check in found["checks"]} <= {"passed", "skipped"}, (at, found)
        bench.finish()


@pytest.mark.parametrize("chosen", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_a_disk_that_is_full_at_the_boundaries(bench, chosen):
    for at in boundaries(len(bench.boundaries), few=6, chosen=chosen):
        outcome = bench.hurt({"kind": "full disk", "at": at})
        if outcome.code:
            assert outcome.code == 1
            assert outcome.stderr.count("\n") == 1, (at, outcome.stderr)
            assert "not expected" not in outcome.stderr, (at, bench.boundaries[at - 1], outcome.stderr)
        bench.finish()


def test_a_disk_that_is_full_when_the_best_is_published(bench):
    [*_, at] = [number for number, name in enumerate(bench.boundaries, 1) if name == "open generation_config.json"]
    outcome = bench.hurt({"kind": "full disk", "at": at})
    assert outcome.code == 1
    assert re.fullmatch(r"Error: .*cannot be written: No space left on device.*\n", outcome.stderr), outcome.stderr
    bench.finish()


def test_terminated(bench):
    outcome = bench.hurt({"kind": "SIGTERM", "at": len(bench.boundaries) // 2})
    assert (outcome.code, outcome.stderr) == (143, "Terminated. Continue with --resume.\n")
    bench.finish()


def test_a_checkpoint_that_was_changed_is_found(bench, cli, tmp_path):
    done = bench.forks.run(bench.root, bench.arguments)
    assert done.code == 0
    folder = shutil.copytree(bench.output, tmp_path / "copy")
    assert cli("verify", folder, "-q").exit_code == 0
    data = bytearray((folder / "model.safetensors").read_bytes())
    data[-1] ^= 1
    (folder / "model.safetensors").write_bytes(data)
    assert cli("verify", folder, "-q").exit_code == 1
