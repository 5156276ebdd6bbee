"""Several processes are one: the same losses, and checkpoints like any other."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
from importlib.util import find_spec
from pathlib import Path

import psutil
import pytest
import yaml

from tests.finetune.conftest import SHORT, loads, weights
from transmla.finetune.trainer import FinetuneTrainer

ALONE = {**os.environ, "OMP_NUM_THREADS": "1", "TRANSMLA_DEBUG": "1"}
FLAGS = "--max-steps 5 --eval-steps 2 --num-eval-windows 15 --device cpu --repeats 0.3 --hard-label-share 0.2"
CONFIGS = Path(__file__).parents[2] / "configs" / "accelerate"


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def command_of(tmp_path, checkpoint, output, text, flags, config, program=("-m", "transmla")):
    """Two processes by ``accelerate launch``; its MULTI_GPU is any number of processes, here on CPUs over gloo."""
    path = tmp_path / "accelerate.yaml"
    common = {"compute_environment": "LOCAL_MACHINE", "num_machines": 1, "num_processes": 2}
    path.write_text(yaml.safe_dump({**common, "main_process_port": free_port(), **config}))
    command = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", path, *program, "finetune"]
    return [*command, checkpoint, output, "--dataset", text, *SHORT.split(), *FLAGS.split(), *flags.split(), "--json"]


def launch(*arguments, **config):
    """Run them, and return what the one that speaks says."""
    done = subprocess.run(
        command_of(*arguments, config), capture_output=True, encoding="utf-8", check=False, env=ALONE, timeout=300
    )
    assert done.returncode == 0, done.stderr[-3000:]
    # What launches the processes may have said something, too.
    report = json.loads(done.stdout[done.stdout.index("{\n") :])
    assert report["num_processes"] == 2
    return report


def sharded(version):
    """The config for many GPUs, but for their number and kind."""
    config = yaml.safe_load((CONFIGS / "fsdp.yaml").read_text())
    fsdp = {**config["fsdp_config"], "fsdp_version": version}
    if version == 1:
        fsdp |= {
            "fsdp_sharding_strategy": "FULL_SHARD",
            "fsdp_use_orig_params": True,
            "fsdp_sync_module_states": False,
        }
    return {"distributed_type": "FSDP", "fsdp_config": fsdp, "mixed_precision": "no"}


def assert_same_losses(one, other):
    assert len(one["heldout"]) == len(other["heldout"]) == 4
    for a, b in zip(one["heldout"], other["heldout"], strict=True):
        # Found: 3e-8 relative.
        assert a["nll"] == pytest.approx(b["nll"], rel=1e-6)
        assert a["kl"] == pytest.approx(b["kl"], rel=1e-4)
        assert a["num_tokens_seen"] == b["num_tokens_seen"]
    for a, b in zip(one["training"], other["training"], strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-4)
        assert a["kl"] == pytest.approx(b["kl"], rel=1e-4)


@pytest.fixture(scope="module")
def alone(cli, converted, calibration_text, tmp_path_factory):
    output = tmp_path_factory.mktemp("alone") / "out"
    arguments = ["finetune", converted, output, "--dataset", calibration_text, *SHORT.split(), *FLAGS.split()]
    result = cli(*arguments, "--json")
    assert result.exit_code == 0, result.stderr
    return json.loads(result.stdout)


def test_two_processes_are_one_with_twice_the_batch(tmp_path, converted, calibration_text, alone):
    flags = "--per-device-train-batch-size 2"
    report = launch(tmp_path, converted, tmp_path / "out", calibration_text, flags, distributed_type="MULTI_GPU")
    assert_same_losses(alone, report)
    assert loads(tmp_path / "out")


@pytest.mark.parametrize("train_what", ["attention", "all"])
@pytest.mark.parametrize("version", [1, 2])
def test_sharded_over_two_processes(tmp_path, converted, calibration_text, alone, version, train_what):
    flags = f"--per-device-train-batch-size 2 --train {train_what}"
    report = launch(tmp_path, converted, tmp_path / "out", calibration_text, flags, **sharded(version))
    if train_what == "attention":
        assert_same_losses(alone, report)
    assert loads(tmp_path / "out")
    assert weights(tmp_path / "out").keys() == weights(converted).keys()


def zero3():
    """The config for many GPUs, but for their number and kind."""
    config = yaml.safe_load((CONFIGS / "zero3.yaml").read_text())
    return {**config, "num_processes": 2, "mixed_precision": "no", "use_cpu": True}


WITH_DEEPSPEED = pytest.mark.skipif(find_spec("deepspeed") is None, reason="needs deepspeed, which compiles itself")


@pytest.mark.slow
@WITH_DEEPSPEED
def test_sharded_by_deepspeed(tmp_path, converted, calibration_text, alone):
    flags = "--per-device-train-batch-size 2"
    report = launch(tmp_path, converted, tmp_path / "out", calibration_text, flags, **zero3())
    assert_same_losses(alone, report)
    assert loads(tmp_path / "out")


@pytest.mark.parametrize("config", [sharded(2), pytest.param(zero3(), marks=[pytest.mark.slow, WITH_DEEPSPEED])])
def test_sharded_and_killed(tmp_path, converted, calibration_text, alone, config):
    """All processes at once, as when a machine goes down."""
    arguments = (tmp_path, converted, tmp_path / "out", calibration_text)
    flags = "--per-device-train-batch-size 2"
    command = command_of(*arguments, flags, config)
    work = tmp_path / ".out.partial" / "work"
    with subprocess.Popen(command, env=ALONE, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        while process.poll() is None and not list(work.glob("checkpoint-*")):
            time.sleep(0.01)
        for victim in [*psutil.Process(process.pid).children(recursive=True), process]:
            victim.kill()
    assert all(loads(folder) for folder in work.glob("checkpoint-*"))
    assert not (tmp_path / "out").exists()
    assert_same_losses(alone, launch(*arguments, f"{flags} --resume", **config))


# Each process writes down what it reads and learns from; the rest is the program.
RECORDER = """
import json, runpy, sys
from transmla.finetune.trainer import FinetuneTrainer
original = FinetuneTrainer.compute_loss
def recorded(self, model, inputs, *others, **options):
    counted = (inputs["labels"] >= 0).any(-1)
    names = inputs["index"] if "index" in inputs else inputs["input_ids"]
    with open(f"{sys.argv[0]}.{self.args.process_index}", "a") as file:
        file.write(json.dumps(names[counted].tolist()) + "\\n")
    return original(self, model, inputs, *others, **options)
FinetuneTrainer.compute_loss = recorded
if __name__ == "__main__":
    runpy.run_module("transmla", run_name="__main__")
"""


@pytest.mark.parametrize("flags", ["--num-train-epochs 2 --max-steps {steps}", "--streaming --max-steps {count}"])
def test_two_processes_read_every_sequence_once(cli, tmp_path, converted, calibration_text, flags):
    """An odd number of them, read by workers: one process has nothing left in the last step of a pass, and waits."""
    text, recipe, script = tmp_path / "text.txt", tmp_path / "recipe.yaml", tmp_path / "recorder.py"
    text.write_text(" ".join(calibration_text.read_text().split()[:235]))
    recipe.write_text("training_arguments: {dataloader_num_workers: 2, dataloader_persistent_workers: true}\n")
    script.write_text(RECORDER)
    few = f"--per-device-train-batch-size 1 --num-eval-windows 2 --train all --repeats 0 --config {recipe}"
    arguments = [converted, tmp_path / "out", "--dataset", text, *SHORT.split(), *few.split(), "--dry-run", "--json"]
    count = json.loads(cli("finetune", *arguments).stdout)["num_sequences"]
    assert count % 2 == 1
    few = f"{few} {flags.format(steps=count + 1, count=count)}"
    config = {"distributed_type": "MULTI_GPU"}
    command = command_of(tmp_path, converted, tmp_path / "out", text, few, config, program=[script])
    done = subprocess.run(command, capture_output=True, encoding="utf-8", check=False, env=ALONE, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    shares = [[json.loads(line) for line in Path(f"{script}.{rank}").read_text().splitlines()] for rank in range(2)]
    assert len(shares[0]) == len(shares[1])
    read = [str(name) for batches in zip(*shares, strict=True) for batch in batches for name in batch]
    assert len(read) == 2 * count
    for one_pass in (read[:count], read[count:]):
        assert len(set(one_pass)) == count
    assert set(read[:count]) == set(read[count:])


def test_another_number_of_processes_does_not_go_on(cli, tmp_path, converted, calibration_text, monkeypatch):
    output, original = tmp_path / "out", FinetuneTrainer.compute_loss

    def interrupted(self, *arguments, **options):
        if self.state.global_step == 3:
            raise KeyboardInterrupt
        return original(self, *arguments, **options)

    monkeypatch.setattr(FinetuneTrainer, "compute_loss", interrupted)
    arguments = [converted, output, "--dataset", calibration_text, *SHORT.split(), *FLAGS.split()]
    assert cli("finetune", *arguments).exit_code == 130
    command = command_of(tmp_path, converted, output, calibration_text, "--resume", {"distributed_type": "MULTI_GPU"})
    done = subprocess.run(
        command, capture_output=True, encoding="utf-8", check=False, env=ALONE | {"TRANSMLA_DEBUG": "0"}, timeout=300
    )
    assert done.returncode != 0
    assert "had number of processes 1 (now 2): repeat those" in done.stderr
    assert list((tmp_path / ".out.partial" / "work").glob("checkpoint-*"))
