"""A conversion that is hurt leaves a whole output or none, and --resume ends with the same bytes."""

from __future__ import annotations

import os
import random
import re
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.factory import tiny_checkpoint
from tests.faults.conftest import Bench, Forks, boundaries, contents

FEW = ("--num-windows", "4", "--num-heldout-windows", "2", "--window", "32")
LAYERS = 3


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    return tiny_checkpoint(tmp_path_factory.mktemp("faults") / "source", shards=2, num_hidden_layers=LAYERS)


@pytest.fixture(scope="module")
def bench(forks: Forks, source, tmp_path_factory, calibration_text) -> Bench:
    root = tmp_path_factory.mktemp("root")
    output = root / "out"
    arguments = ["convert", source, output, "--kv-ratio", "0.5", "--calibration", calibration_text, *FEW]
    arguments += ["--max-shard-size", "100kB", "-q"]
    done = forks.run(root, arguments)
    assert done.code == 0, done.stderr
    bench = Bench(forks, root, output, arguments, contents(output), done.names, same=lambda a, b: a == b)
    bench.clean()
    return bench


@pytest.fixture(autouse=True)
def untouched(bench, source):
    """Whatever happens, the source stays as it was, and the next test finds an empty folder."""
    before = contents(source)
    yield
    assert contents(source) == before
    bench.clean()


@contextmanager
def put_back(path: Path) -> Iterator[None]:
    """Have a file afterwards as it was before."""
    kept = path.read_bytes()
    try:
        yield
    finally:
        path.write_bytes(kept)


def test_the_boundaries_are_where_files_change(bench):
    kinds = {name.split()[0] for name in bench.boundaries}
    assert {"open", "os.rename", "os.mkdir", "sync"} <= kinds
    assert sum(name.endswith(".safetensors") for name in bench.boundaries) > 30
    assert len(bench.boundaries) > 80


@pytest.mark.parametrize("chosen", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_killed_at_the_boundaries(bench, chosen):
    for at in boundaries(len(bench.boundaries), few=9, chosen=chosen):
        outcome = bench.hurt({"kind": "SIGKILL", "at": at})
        assert outcome.code == -9, (at, outcome)
        bench.finish()


@pytest.mark.parametrize("chosen", [True, pytest.param(False, marks=pytest.mark.slow)])
@pytest.mark.parametrize("kind", ["full disk", "broken disk"])
def test_a_disk_that_refuses_at_the_boundaries(bench, kind, chosen):
    for at in boundaries(len(bench.boundaries), few=7, chosen=chosen):
        outcome = bench.hurt({"kind": kind, "at": at})
        if outcome.code:
            assert outcome.code == 1
            assert outcome.stderr.count("\n") == 1, (at, outcome.stderr)
            assert outcome.stderr.startswith("Error: ")
            assert "not expected" not in outcome.stderr, (at, outcome.stderr)
        bench.finish()


@pytest.mark.parametrize("runs", [4, pytest.param(50, marks=pytest.mark.slow)])
def test_killed_at_random_times(bench, runs):
    chance = random.Random(0)
    for _ in range(runs):
        outcome = bench.hurt({"kind": "SIGKILL", "after": chance.uniform(0, 0.8)})
        assert outcome.code in (-9, 0), outcome
        bench.finish()


@pytest.mark.parametrize("share", [0, 0.5])
def test_a_disk_that_becomes_read_only(bench, share):
    outcome = bench.hurt({"kind": "read-only disk", "at": 1 + round(share * len(bench.boundaries))})
    assert outcome.code == 1
    assert re.fullmatch(r"Error: .*Read-only file system.*\n", outcome.stderr), outcome.stderr
    bench.finish()


@pytest.mark.skipif(os.geteuid() != 0, reason="only root may mount")
def test_a_disk_that_is_really_full(bench, tmp_path):
    """A small one in memory: the work moves on to it, and back when it is too small."""
    small = tmp_path / "small"
    small.mkdir()
    size = sum(len(value) for name, value in bench.whole.items() if name.endswith(".safetensors"))
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={size + 2 * 4096}", "tmpfs", small], capture_output=True, check=False
    )
    if mounted.returncode:
        pytest.skip("mounting is not allowed here")
    try:
        arguments = [small / "out" if word == bench.output else word for word in bench.arguments]
        outcome = bench.forks.run(small, arguments, fault={"kind": "small disk"})
        assert outcome.code == 1
        assert outcome.stderr.count("\n") == 1
        assert re.search("No space left|is full|only .* free", outcome.stderr), outcome.stderr
        assert "not expected" not in outcome.stderr
        assert not (small / "out").exists()
    finally:
        subprocess.run(["umount", small], check=True)


@pytest.mark.parametrize("chosen", [True, pytest.param(False, marks=pytest.mark.slow)])
@pytest.mark.parametrize(("kind", "code", "word"), [("SIGINT", 130, "Interrupted."), ("SIGTERM", 143, "Terminated.")])
def test_signals_at_the_boundaries(bench, kind, code, word, chosen):
    for at in boundaries(len(bench.boundaries), few=5, chosen=chosen):
        outcome = bench.hurt({"kind": kind, "at": at})
        if outcome.code:
            assert outcome.code == code, (at, outcome)
            assert re.fullmatch(rf"{word}( Continue with --resume\.)?\n", outcome.stderr), (at, outcome.stderr)
        bench.finish()


@pytest.mark.parametrize("share", [0.3, 0.6])
def test_a_hidden_folder_that_somebody_deletes(bench, share):
    hidden = bench.output.with_name(f".{bench.output.name}.partial")
    outcome = bench.hurt({"kind": "delete", "at": round(share * len(bench.boundaries)), "path": str(hidden)})
    assert outcome.code == 1
    assert re.fullmatch(r"Error: .*(deleted or replaced|No such file).*\n", outcome.stderr), outcome.stderr
    assert not bench.output.exists()
    bench.finish()


@pytest.mark.parametrize("share", [0.3, 0.6])
def test_a_source_that_shrinks(bench, source, share):
    shard = sorted(source.glob("*.safetensors"))[1]
    stamp = shard.stat()
    at = round(share * len(bench.boundaries))
    with put_back(shard):
        outcome = bench.hurt({"kind": "truncate", "at": at, "path": str(shard), "size": 4000})
    assert outcome.code == 1
    assert re.search("it has been changed|was changed while it was converted", outcome.stderr), outcome.stderr
    assert outcome.stderr.count("\n") == 1
    assert not bench.output.exists()
    assert stamp.st_size == shard.stat().st_size


@pytest.mark.parametrize("share", [0.2, 0.6])
def test_a_source_that_becomes_another(bench, source, tmp_path, share):
    """Same names, shapes and sizes, other weights: the output would be made of two models."""
    shard = sorted(source.glob("*.safetensors"))[1]
    other = tiny_checkpoint(tmp_path / "other", shards=2, num_hidden_layers=LAYERS, seed=7) / shard.name
    assert shard.stat().st_size == other.stat().st_size
    at = round(share * len(bench.boundaries))
    with put_back(shard):
        outcome = bench.hurt({"kind": "replace", "at": at, "path": str(shard), "by": str(other)})
    assert outcome.code == 1
    assert "was changed while it was converted" in outcome.stderr
    assert not bench.output.exists()


def test_a_source_that_changes_when_it_has_been_read(bench, source):
    """Only the files are still to be written: the output is that of an undisturbed run."""
    shard = sorted(source.glob("*.safetensors"))[1]
    at = len(bench.boundaries) - 3
    with put_back(shard):
        outcome = bench.hurt({"kind": "truncate", "at": at, "path": str(shard), "size": 4000})
    assert outcome.code == 0
    bench.finish()


@pytest.mark.parametrize("share", [0.4, 0.6])
def test_memory_that_is_used_up(bench, share):
    at = round(share * len(bench.boundaries))
    outcome = bench.hurt({"kind": "memory", "at": at, "bytes": 10_000})
    assert outcome.code == 1, outcome
    assert re.search(r"^Error: There is not enough memory", outcome.stderr), outcome.stderr
    assert outcome.stderr.count("\n") == 1
    bench.finish()


def test_a_clock_that_jumps(bench):
    outcome = bench.hurt({"kind": "clock", "at": len(bench.boundaries) // 2})
    assert outcome.code == 0
    bench.finish()


@pytest.mark.parametrize("share", [0.05, 0.5])
def test_files_that_may_not_grow(bench, share):
    """A quota: what is written beyond it is refused."""
    largest = max(len(value) for name, value in bench.whole.items() if name.endswith(".safetensors"))
    outcome = bench.hurt(None, limits={"RLIMIT_FSIZE": round(share * largest)})
    assert outcome.code == 1
    assert outcome.stderr.count("\n") == 1
    assert "not expected" not in outcome.stderr, outcome.stderr
    bench.finish()


def test_two_at_once(bench):
    """One of them writes; the other says so, and harms nothing."""
    command = [sys.executable, "-m", "transmla", *map(str, bench.arguments)]
    running = [subprocess.Popen(command, stderr=subprocess.PIPE, text=True) for _ in range(2)]
    errors = [process.communicate()[1] for process in running]
    codes = sorted(process.returncode for process in running)
    assert codes in ([0, 1], [0, 0]), errors
    if codes == [0, 1]:
        [sentence] = filter(None, errors)
        assert re.search("Another process is writing|is not empty", sentence)
    assert contents(bench.output) == bench.whole
    assert {path.name for path in bench.root.iterdir()} == {"out"}


def test_an_output_that_was_there_survives(bench):
    """With --overwrite: until the new one is whole, the old one stays."""
    for at in boundaries(len(bench.boundaries), few=5, chosen=True):
        old = bench.output
        old.mkdir()
        (old / "config.json").write_text('{"old": true}')
        outcome = bench.forks.run(bench.root, [*bench.arguments, "--overwrite"], fault={"kind": "SIGKILL", "at": at})
        assert outcome.code == -9
        partial = bench.root / ".out.partial" / "replaced"
        held = [folder for folder in (old, partial) if (folder / "config.json").is_file()]
        assert any((folder / "config.json").read_text() == '{"old": true}' for folder in held) or (
            contents(old) == bench.whole
        )
        done = bench.forks.run(bench.root, [*bench.arguments, "--overwrite", "--resume"])
        assert done.code == 0, done.stderr
        assert contents(old) == bench.whole
        assert {path.name for path in bench.root.iterdir()} == {"out"}
        bench.clean()
