"""Nothing is lost: a killed run goes on where it was, and what lies there meanwhile is whole."""

from __future__ import annotations

import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.factory import TEXT
from tests.finetune.conftest import SHORT, loads, weights
from transmla.finetune.distill.teacher import Teacher
from transmla.finetune.trainer import FinetuneTrainer, ReportingCallback

FLAGS = "--max-steps 10 --eval-steps 3"


def report_of(folder):
    return json.loads((folder / "transmla_finetune.json").read_text())


@pytest.fixture(scope="module")
def undisturbed(cli, converted, calibration_text, tmp_path_factory):
    output = tmp_path_factory.mktemp("undisturbed") / "out"
    arguments = ["finetune", converted, output, "--dataset", calibration_text, *SHORT.split(), *FLAGS.split()]
    assert cli(*arguments).exit_code == 0
    return output


def checkpoints(output: Path) -> list[Path]:
    return sorted((output.with_name(f".{output.name}.partial") / "work").glob("checkpoint-*"))


@pytest.fixture
def interrupted(cli, converted, calibration_text, tmp_path, monkeypatch):
    """Run a training that is interrupted before a step, and return its arguments."""

    def interrupted(step, flags=FLAGS):
        output = tmp_path / "out"
        arguments = ["finetune", converted, output, "--dataset", calibration_text, *SHORT.split(), *flags.split()]

        def interrupt(self, args, state, control, **_):
            if state.global_step == step:
                raise KeyboardInterrupt

        with monkeypatch.context() as patch:
            patch.setattr(ReportingCallback, "on_step_begin", interrupt, raising=False)
            result = cli(*arguments)
        assert result.exit_code == 130
        assert "Continue with --resume." in result.stderr
        assert not output.exists()
        return arguments

    return interrupted


@pytest.mark.parametrize("step", [4, 6, 8])
def test_an_interrupted_run_goes_on(cli, interrupted, undisturbed, tmp_path, step):
    arguments, output = interrupted(step), tmp_path / "out"
    assert checkpoints(output)
    assert all(loads(folder) for folder in checkpoints(output))

    assert cli(*arguments, "--resume").exit_code == 0
    first, second = weights(undisturbed), weights(output)
    for name in first:
        torch.testing.assert_close(first[name], second[name], rtol=1e-5, atol=1e-8)
    one, other = report_of(undisturbed), report_of(output)
    assert [point["step"] for point in other["heldout"]] == [point["step"] for point in one["heldout"]]
    for a, b in zip(one["heldout"], other["heldout"], strict=True):
        assert a["nll"] == pytest.approx(b["nll"], rel=1e-6)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("seconds", [0.0, 0.05, 0.15])
def test_a_killed_process_goes_on(converted, calibration_text, undisturbed, tmp_path, seconds):
    """SIGKILL, some time after the first checkpoint has appeared."""
    output = tmp_path / "out"
    command = [sys.executable, "-m", "transmla", "finetune", converted, output, "--dataset", calibration_text]
    command += [*SHORT.split(), *FLAGS.split()]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    with subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE) as process:
        while process.poll() is None and not checkpoints(output):
            time.sleep(0.01)
        time.sleep(seconds)
        process.send_signal(signal.SIGKILL)
    # Whatever is there is whole; the output only if it had come that far.
    for folder in [*checkpoints(output), *([output] if output.exists() else [])]:
        assert loads(folder)
    if output.exists():
        return

    done = subprocess.run([*command, "--resume"], env=environment, capture_output=True, encoding="utf-8", check=False)
    assert done.returncode == 0, done.stderr
    assert report_of(output)["heldout"][-1]["nll"] == pytest.approx(
        report_of(undisturbed)["heldout"][-1]["nll"], rel=1e-6
    )


def test_interrupted_while_it_publishes(cli, converted, calibration_text, undisturbed, tmp_path, monkeypatch):
    """The checkpoint stays whole, and nothing is trained again."""
    output = tmp_path / "out"
    arguments = ["finetune", converted, output, "--dataset", calibration_text, *SHORT.split(), *FLAGS.split()]

    def interrupt(*_, **__):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("transmla.finetune.run.publish_texts", interrupt)
        assert cli(*arguments).exit_code == 130
    assert not output.exists()
    assert all(loads(folder) for folder in checkpoints(output))
    with monkeypatch.context() as patch:
        patch.setattr(FinetuneTrainer, "training_step", interrupt)
        result = cli(*arguments, "--resume")
    assert result.exit_code == 0, result.stderr
    assert [point["step"] for point in report_of(output)["heldout"]] == [0, 3, 6, 9, 10]
    first, second = weights(undisturbed), weights(output)
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_a_teacher_that_is_interrupted_goes_on(cli, converted, calibration_text, tmp_path, monkeypatch):
    output = tmp_path / "out"
    arguments = ["finetune", converted, output, "--dataset", calibration_text, *SHORT.split(), "--max-steps", 2]
    arguments += ["--teacher-top-k", 8]
    read = []
    original = Teacher.read

    def interrupted(self, input_ids, *others):
        read.append(len(input_ids))
        if len(read) == 4:
            raise KeyboardInterrupt
        return original(self, input_ids, *others)

    monkeypatch.setattr(Teacher, "read", interrupted)
    assert cli(*arguments).exit_code == 130
    before = sum(read[:3])
    assert cli(*arguments, "--resume").exit_code == 0
    report = report_of(output)
    assert before + sum(read[4:]) == report["num_sequences"] + report["num_heldout_sequences"]


def test_without_resume_it_starts_anew(cli, interrupted, tmp_path):
    assert cli(*interrupted(4), "--max-steps", 2).exit_code == 0
    assert [point["step"] for point in report_of(tmp_path / "out")["heldout"]] == [0, 2]


def test_other_settings_do_not_go_on(cli, interrupted, tmp_path):
    result = cli(*interrupted(4), "--resume", "--seed", 3)
    assert result.exit_code == 1
    assert "had --seed 0 (now 3): repeat" in result.stderr
    assert checkpoints(tmp_path / "out")


@pytest.mark.parametrize("flags", ["", "--streaming"])
def test_other_data_do_not_go_on(cli, converted, tmp_path, monkeypatch, flags):
    """Of a stream nothing but the start has been read when this is judged, and the start is the same."""
    text, original = tmp_path / "text.txt", FinetuneTrainer.compute_loss
    text.write_text(TEXT * 8, encoding="utf-8")
    arguments = ["finetune", converted, tmp_path / "out", "--dataset", text, *SHORT.split(), *FLAGS.split()]

    def interrupted(self, *others, **options):
        if self.state.global_step == 4:
            raise KeyboardInterrupt
        return original(self, *others, **options)

    with monkeypatch.context() as patch:
        patch.setattr(FinetuneTrainer, "compute_loss", interrupted)
        assert cli(*arguments, *flags.split()).exit_code == 130
    text.write_text(TEXT * 7 + TEXT.upper(), encoding="utf-8")
    result = cli(*arguments, *flags.split(), "--resume")
    assert result.exit_code == 1
    assert (str(text) if flags else "had tokens '") in result.stderr


# Some 30 sequences in memory, so that a pass ends after four steps, and the last step of each has fewer batches.
WAYS = {
    "memory": ("--gradient-accumulation-steps 2 --dataset {short}", ""),
    "workers": ("--gradient-accumulation-steps 2 --dataset {short}", "{dataloader_num_workers: 2}"),
    "persistent": ("--dataset {short}", "{dataloader_num_workers: 1, dataloader_persistent_workers: true}"),
    "written": ("--gradient-accumulation-steps 2 --dataset {short} --teacher-top-k 4", ""),
    "stream": ("--gradient-accumulation-steps 2 --streaming --dataset {short}", ""),
    "streams and workers": ("--streaming --dataset {short} --dataset {long}", "{dataloader_num_workers: 2}"),
}


@pytest.mark.parametrize(("flags", "keys"), WAYS.values(), ids=WAYS)
def test_the_same_sequences_in_the_same_order(cli, converted, tmp_path, monkeypatch, flags, keys):
    """Token by token: what a resumed run reads goes on where the interrupted one has saved, within a pass."""
    words = (TEXT * 4).split()
    (tmp_path / "short.txt").write_text(" ".join(words[:380]), encoding="utf-8")
    (tmp_path / "long.txt").write_text(" ".join(words[::-1]), encoding="utf-8")
    (tmp_path / "recipe.yaml").write_text(f"training_arguments: {keys or '{}'}\n")
    flags = flags.format(short=tmp_path / "short.txt", long=tmp_path / "long.txt").split()
    arguments = ["--window", 16, "--num-eval-windows", 2, "--per-device-train-batch-size", 4, "-q", *flags]
    arguments += ["--config", tmp_path / "recipe.yaml", "--max-steps", 14, "--eval-steps", 3]
    read: list[list[list[int]]] = []
    stop = None
    original = FinetuneTrainer.compute_loss

    def recorded(self, model, inputs, *others, **options):
        if self.state.global_step == stop:
            raise KeyboardInterrupt
        read.append(inputs["input_ids"].tolist())
        return original(self, model, inputs, *others, **options)

    monkeypatch.setattr(FinetuneTrainer, "compute_loss", recorded)
    assert cli("finetune", converted, tmp_path / "undisturbed", *arguments).exit_code == 0
    undisturbed, stop = read[:], 8
    read.clear()
    assert cli("finetune", converted, tmp_path / "out", *arguments).exit_code == 130
    before, stop = read[:], None
    read.clear()
    assert cli("finetune", converted, tmp_path / "out", *arguments, "--resume").exit_code == 0
    assert before == undisturbed[: len(before)]
    # Steps 7 and 8 were done, and not saved.
    assert len(read) < len(undisturbed) - len(before) + 5
    assert read == undisturbed[-len(read) :]


@pytest.mark.parametrize("which", ["converted", "teacher"])
def test_models_that_are_replaced_with_their_time_kept_do_not_go_on(
    cli, pair, calibration_text, tmp_path, monkeypatch, which
):
    """What a teacher has written down of one model is not learnt with that of another."""
    models = {"converted": tmp_path / "converted", "teacher": tmp_path / "teacher"}
    for name, original in zip(("teacher", "converted"), pair, strict=True):
        shutil.copytree(original, models[name])
    arguments = ["finetune", models["converted"], tmp_path / "out", "--teacher", models["teacher"]]
    arguments += ["--dataset", calibration_text, *SHORT.split(), "--max-steps", 2, "--teacher-top-k", 8]
    with monkeypatch.context() as patch:
        patch.setattr(FinetuneTrainer, "train", lambda *_, **__: (_ for _ in ()).throw(KeyboardInterrupt))
        assert cli(*arguments).exit_code == 130
    path = max(models[which].glob("*.safetensors"))
    before = path.stat()
    stored = load_file(path)
    save_file({name: weight.flip(0).contiguous() for name, weight in stored.items()}, path, {"format": "pt"})
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert path.stat().st_size == before.st_size
    result = cli(*arguments, "--resume")
    assert result.exit_code == 1
    assert f"weights{' of the teacher' if which == 'teacher' else ''}" in result.stderr


def test_a_gradient_that_is_not_finite_stops(cli, converted, calibration_text, tmp_path, monkeypatch):
    output = tmp_path / "out"
    original = FinetuneTrainer.compute_loss

    def spoiled(self, *arguments, **options):
        loss = original(self, *arguments, **options)
        return loss * math.nan if self.state.global_step == 5 else loss

    with monkeypatch.context() as patch:
        patch.setattr(FinetuneTrainer, "compute_loss", spoiled)
        result = cli("finetune", converted, output, "--dataset", calibration_text, *SHORT.split(), *FLAGS.split())
    assert result.exit_code == 1
    assert "not finite in step 6" in result.stderr
    assert not output.exists()
    last = checkpoints(output)[-1]
    assert last.name == "checkpoint-5"
    assert loads(last)


def test_the_best_and_the_newest_are_kept(interrupted, tmp_path, monkeypatch):
    original = FinetuneTrainer.evaluate

    def worse_and_worse(self, *arguments, **options):
        metrics = original(self, *arguments, **options)
        metrics["eval_selection"] = float(self.state.global_step)
        return metrics

    monkeypatch.setattr(FinetuneTrainer, "evaluate", worse_and_worse)
    interrupted(9, "--max-steps 10 --eval-steps 2")
    assert [path.name for path in checkpoints(tmp_path / "out")] == ["checkpoint-2", "checkpoint-8"]
