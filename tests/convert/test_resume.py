"""A run that is interrupted leaves no output, and can be continued to the same bytes."""

from __future__ import annotations

import errno
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from unittest.mock import Mock

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.convert.models import contents, interrupt_after
from tests.factory import tiny_checkpoint
from transmla.calibration.stream import SourceStream
from transmla.checkpoint.writer import CheckpointWriter
from transmla.config import ConvertRequest
from transmla.convert import run as conversion
from transmla.convert.layers import convert_layers
from transmla.convert.plan import plan_conversion
from transmla.data.text import consecutive_windows, load_tokenizer
from transmla.data.tokens import text_start

LAYERS = 3
# Neither the fitted nor the held-out windows fill their last batch.
FLAGS = "--kv-ratio 0.5 --num-windows 5 --num-heldout-windows 2 --batch-size 3 --window 40 --max-shard-size 100kB"
FLAGS += " --heal-steps 2 -q"


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    return tiny_checkpoint(tmp_path_factory.mktemp("source"), shards=2, num_hidden_layers=LAYERS)


@pytest.fixture(scope="module")
def flags(calibration_text):
    return [*FLAGS.split(), "--calibration", str(calibration_text)]


@pytest.fixture(scope="module")
def undisturbed(cli, source, flags, tmp_path_factory):
    output = tmp_path_factory.mktemp("undisturbed") / "out"
    assert cli("convert", source, output, *flags).exit_code == 0
    return contents(output)


@pytest.fixture
def output(tmp_path):
    return tmp_path / "out"


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


@pytest.mark.parametrize("layers", range(1, LAYERS + 1))
def test_resumed_bytes_are_those_of_an_undisturbed_run(cli, source, flags, undisturbed, output, monkeypatch, layers):
    with monkeypatch.context() as patch:
        interrupt_after(patch, layers, KeyboardInterrupt())
        result = cli("convert", source, output, *flags)
    assert result.exit_code == 130
    assert result.stderr == "Interrupted. Continue with --resume.\n"
    assert result.stdout == ""
    assert names(output.parent) == {".out.partial"}

    converted = []
    walk = conversion.convert_layers
    monkeypatch.setattr(
        conversion,
        "convert_layers",
        lambda *args, **kwargs: (converted.append(report.layer) or report for report in walk(*args, **kwargs)),
    )
    result = cli("convert", source, output, *flags, "--resume")
    assert result.exit_code == 0, result.stderr
    assert converted == list(range(layers, LAYERS))
    assert names(output.parent) == {"out"}
    assert contents(output) == undisturbed


def test_an_interrupt_inside_the_first_layer_leaves_nothing(cli, source, flags, output, monkeypatch):
    def interrupt(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(CheckpointWriter, "write", interrupt)
    result = cli("convert", source, output, *flags)
    assert (result.exit_code, result.stderr) == (130, "Interrupted.\n")
    assert names(output.parent) == set()


def test_the_space_that_is_taken_already_is_not_asked_for_again(cli, source, flags, output, monkeypatch):
    with monkeypatch.context() as patch:
        interrupt_after(patch, 1, KeyboardInterrupt())
        assert cli("convert", source, output, *flags).exit_code == 130
    monkeypatch.setattr("shutil.disk_usage", lambda folder: Mock(free=0))
    assert cli("convert", source, output, *flags, "--resume").exit_code == 0


def test_a_half_written_layer_is_written_again(cli, source, flags, undisturbed, output, monkeypatch):
    """The kill hits after the tensors of layer 1 have been written, before they are noted."""
    write = CheckpointWriter.write

    def killed(self, tensors):
        write(self, tensors)
        if any(name.startswith("model.layers.1.") for name in tensors):
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(CheckpointWriter, "write", killed)
        assert cli("convert", source, output, *flags).exit_code == 130
    assert cli("convert", source, output, *flags, "--resume").exit_code == 0
    assert contents(output) == undisturbed


def test_layers_that_are_passed_over_see_the_same_batches(source, flags, output, calibration_text, monkeypatch):
    """The last bits of a product depend on how many rows it has, so that larger models would differ otherwise."""
    request = ConvertRequest(
        model=str(source),
        output_dir=output,
        calibration=str(calibration_text),
        kv_ratio=0.5,
        num_windows=5,
        repeats=0.0,
        num_heldout_windows=2,
        batch_size=3,
        window=40,
    )
    plan = plan_conversion(request)
    plan, windows = conversion.calibration_windows(plan)
    seen: list[int] = []
    advance = SourceStream.advance

    def watched(self, layer, rows):
        for attended in advance(self, layer, rows):
            seen.append(len(attended.input))
            yield attended

    monkeypatch.setattr(SourceStream, "advance", watched)
    stored: dict[str, torch.Tensor] = {}
    assert len(list(convert_layers(plan, windows, write=stored.update))) == LAYERS
    assert seen == [3, 2, 2] * LAYERS
    seen.clear()

    def read_stored(names):
        return {name: stored[name] for name in names}

    assert not list(convert_layers(plan, windows, write=stored.update, start=LAYERS, read_stored=read_stored))
    assert seen == [3, 2, 2] * LAYERS


def test_an_exact_run_resumes_too(cli, source, output, monkeypatch):
    assert cli("convert", source, output.with_name("whole"), "--exact", "-q").exit_code == 0
    with monkeypatch.context() as patch:
        interrupt_after(patch, 2, KeyboardInterrupt())
        assert cli("convert", source, output, "--exact", "-q").exit_code == 130
    assert cli("convert", source, output, "--exact", "-q", "--resume").exit_code == 0
    whole = contents(output.with_name("whole"))
    # The card is titled with the folder's name.
    assert {**contents(output), "README.md": None} == {**whole, "README.md": None}


def test_resuming_wants_the_same_settings_text_and_source(cli, source, flags, output, calibration_text, monkeypatch):
    with monkeypatch.context() as patch:
        interrupt_after(patch, 1, KeyboardInterrupt())
        assert cli("convert", source, output, *flags).exit_code == 130
    before = staged(output)

    other_text = output.with_name("other.txt")
    other_text.write_text(calibration_text.read_text(encoding="utf-8")[2000:], encoding="utf-8")
    other_source = tiny_checkpoint(output.with_name("source"), shards=2, num_hidden_layers=LAYERS, seed=7)
    for arguments, difference in (
        ([source, output, *flags, "--seed", "1"], "--seed 0 (now 1)"),
        ([source, output, *flags, "--kv-ratio", "0.4"], "config of the result "),
        ([source, output, *flags, "--calibration", other_text], "calibration windows "),
        ([other_source, output, *flags], "files of the source "),
    ):
        result = cli("convert", *arguments, "--resume")
        assert result.exit_code == 1
        expected = rf" had .*{re.escape(difference)}.*: repeat those, or start anew without --resume"
        assert re.search(expected, result.stderr)
        assert result.stderr.count("\n") == 1
        assert not output.exists()
    assert staged(output) == before

    assert cli("convert", source, output, *flags, "--resume").exit_code == 0


def test_resuming_notices_a_source_that_was_replaced(cli, tmp_path, output, monkeypatch):
    source = tiny_checkpoint(tmp_path / "source")
    with monkeypatch.context() as patch:
        interrupt_after(patch, 1, KeyboardInterrupt())
        assert cli("convert", source, output, "--exact", "-q").exit_code == 130
    tiny_checkpoint(source, seed=7)  # the same names, shapes and sizes
    result = cli("convert", source, output, "--exact", "-q", "--resume")
    assert result.exit_code == 1
    assert " had files of the source " in result.stderr


def staged(output: Path) -> dict[str, bytes]:
    root = output.with_name(f".{output.name}.partial")
    return {path.relative_to(root).as_posix(): path.read_bytes() for path in root.rglob("*") if path.is_file()}


def test_without_resume_it_starts_anew(cli, source, flags, undisturbed, output, monkeypatch):
    with monkeypatch.context() as patch:
        interrupt_after(patch, 2, KeyboardInterrupt())
        assert cli("convert", source, output, *flags, "--seed", "3").exit_code == 130
    started = []
    walk = conversion.convert_layers
    monkeypatch.setattr(
        conversion, "convert_layers", lambda *args, start, **kw: started.append(start) or walk(*args, start=start, **kw)
    )
    assert cli("convert", source, output, *flags).exit_code == 0
    assert started == [0]
    assert contents(output) == undisturbed
    assert names(output.parent) == {"out"}


def test_resume_with_nothing_to_resume_is_a_first_run(cli, source, flags, undisturbed, output):
    assert cli("convert", source, output, *flags, "--resume").exit_code == 0
    assert contents(output) == undisturbed


def test_an_unexpected_failure_keeps_the_work_and_says_so(cli, source, flags, undisturbed, output, monkeypatch):
    with monkeypatch.context() as patch:
        interrupt_after(patch, 2, RuntimeError("the device\nis gone"))
        result = cli("convert", source, output, *flags)
    assert result.exit_code == 1
    assert result.stderr == (
        "Error: RuntimeError: the device is gone (not expected; TRANSMLA_DEBUG=1 shows where) Continue with --resume.\n"
    )
    assert names(output.parent) == {".out.partial"}
    assert cli("convert", source, output, *flags, "--resume").exit_code == 0
    assert contents(output) == undisturbed


_KILLED = """
import os, signal
from transmla.checkpoint.journal import Journal
append = Journal.append
def killed(self, entry):
    append(self, entry)
    if len(self.entries) == 2:
        os.kill(os.getpid(), signal.SIGKILL)
Journal.append = killed
from transmla.cli.app import main
main()
"""


def test_a_killed_process_can_be_continued_by_another(cli, source, flags, undisturbed, output):
    killed = subprocess.run(
        [sys.executable, "-c", _KILLED, "convert", str(source), str(output), *flags],
        env={**os.environ, "PYTHONPATH": os.getcwd()},
        capture_output=True,
        check=False,
    )
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert names(output.parent) == {".out.partial"}
    result = cli("convert", source, output, *flags, "--resume")
    assert result.exit_code == 0, result.stderr
    assert contents(output) == undisturbed
    assert names(output.parent) == {"out"}


def test_a_disk_that_fills_up_at_the_end_costs_no_work(cli, source, flags, undisturbed, output, monkeypatch):
    with monkeypatch.context() as patch:
        full = OSError(errno.ENOSPC, "No space left on device", "tokenizer.json")
        patch.setattr(conversion, "copy_model_files", Mock(side_effect=full))
        result = cli("convert", source, output, *flags)
    assert result.exit_code == 1
    sentence = "Error: tokenizer.json cannot be written: No space left on device. Continue with --resume.\n"
    assert result.stderr == sentence
    assert names(output.parent) == {".out.partial"}
    assert cli("convert", source, output, *flags, "--resume").exit_code == 0
    assert contents(output) == undisturbed


@pytest.mark.parametrize("small", [2**26, 0])
def test_weights_that_are_replaced_with_their_time_kept_are_another_source(
    cli, source, flags, output, tmp_path, monkeypatch, small
):
    """cp -p, rsync -t, archives and stores with one time for all files keep name, size and time."""
    monkeypatch.setattr("transmla.checkpoint.stamps.SMALL", small)
    folder = tmp_path / "source"
    shutil.copytree(source, folder)
    with monkeypatch.context() as patch:
        interrupt_after(patch, 1, KeyboardInterrupt())
        cli("convert", folder, output, *flags)
    path = max(folder.glob("*.safetensors"))
    before = path.stat()
    weights = load_file(path)
    save_file({name: weight.flip(0).contiguous() for name, weight in weights.items()}, path, {"format": "pt"})
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert path.stat().st_size == before.st_size
    result = cli("convert", folder, output, *flags, "--resume")
    assert result.exit_code == 1
    assert " had files of the source " in result.stderr


@pytest.mark.parametrize(
    ("heal_steps", "num_windows", "expected"), [(0, None, 128), (60, None, 160), (30, None, 128), (60, 20, 20)]
)
def test_healing_reads_as_much_text_as_its_steps_need(
    source, output, calibration_text, heal_steps, num_windows, expected
):
    """Each window three times over, in batches of eight; no less than without healing, and no more than was asked."""
    request = ConvertRequest(
        model=str(source),
        output_dir=output,
        calibration=str(calibration_text),
        kv_ratio=0.5,
        heal_steps=heal_steps,
        num_windows=num_windows,
        window=16,
    )
    plan, windows = conversion.prepare(request, predict=False)
    assert plan.num_windows == plan.counts.natural == expected
    # The recipe asks for what was asked for, and so gives the same again.
    assert plan.request.num_windows == num_windows
    assert len(windows) == plan.counts.num_fit + plan.counts.num_heldout
    assert plan.counts.repeats == round(0.33 * expected)


def test_healing_takes_what_the_text_has(source, output, calibration_text):
    request = ConvertRequest(
        model=str(source),
        output_dir=output,
        calibration=str(calibration_text),
        kv_ratio=0.5,
        heal_steps=90_000,
        window=16,
    )
    plan, windows = conversion.prepare(request, predict=False)
    everything = plan.num_windows + request.num_heldout_windows
    tokenizer = load_tokenizer(plan.source)
    text = calibration_text.read_text()
    assert everything == len(consecutive_windows([text], tokenizer, window=16, start=text_start(tokenizer)))
    assert len(windows) == plan.counts.num_fit + plan.counts.num_heldout
