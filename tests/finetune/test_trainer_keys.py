"""Keys of a recipe's ``training_arguments``: heard, or refused in a sentence before a weight is read."""

from __future__ import annotations

import json
import re
from dataclasses import fields

import pytest
import typer
from transformers import TrainingArguments

from transmla.cli.app import app
from transmla.config import FinetuneRequest
from transmla.errors import UsageError
from transmla.finetune.arguments import training_arguments
from transmla.finetune.data.datasets import Data
from transmla.finetune.data.packing import PackedDataset, Row
from transmla.finetune.trainer_keys import FLAGS, HEEDED, OWN, REFUSED, check_keys

FIELDS = {field.name for field in fields(TrainingArguments)}
ROWS = PackedDataset([Row([1, 2, 3], [True, False, False], [True] * 3) for _ in range(8)])


def build(tmp_path, keys=(), **flags):
    """The arguments of a training on the CPU with these keys in its recipe."""
    settings = {"device": "cpu", "max_steps": 3, **flags}
    request = FinetuneRequest(
        checkpoint="mla", output_dir=tmp_path / "out", dataset=("text.txt",), training_arguments=dict(keys), **settings
    )
    return training_arguments(request, Data(ROWS, ROWS, ""), tmp_path / "work")


def test_every_field_of_the_installed_release_is_known():
    """One of a newer release fails here, and is refused at run time, until somebody has looked at it."""
    assert HEEDED | FLAGS.keys() | OWN | REFUSED.keys() >= FIELDS


def test_no_key_is_of_two_kinds():
    kinds = (HEEDED, set(FLAGS), OWN, set(REFUSED))
    assert sum(map(len, kinds)) == len(set().union(*kinds))


@pytest.mark.parametrize("key", sorted(FIELDS - HEEDED))
def test_what_is_not_heeded_is_refused(tmp_path, key):
    with pytest.raises(UsageError, match=rf"^training_arguments: {key} \w.*\.$"):
        build(tmp_path, {key: 1})


def test_flags_that_are_named_exist():
    flags = {FinetuneRequest.spell(field) for field in FinetuneRequest.model_fields} - {"OUTPUT_DIR"}
    assert {FLAGS.get(field, "--seed") for field in FinetuneRequest.model_fields} <= {*flags, "the argument OUTPUT_DIR"}
    parser = typer.main.get_command(app).commands["finetune"]
    known = {spelling for parameter in parser.params for spelling in (*parameter.opts, *parameter.secondary_opts)}
    reasons = " ".join((*FLAGS.values(), *REFUSED.values()))
    # That of accelerate is printed as a command.
    assert set(re.findall(r"--[a-z][a-z0-9_-]+", reasons)) <= {*known, "--config_file"}


def test_all_problems_are_told_at_once(tmp_path):
    with pytest.raises(UsageError, match=r"label_smoothing_factor has no effect .*; push_to_hub is --push-to-hub here"):
        build(tmp_path, {"label_smoothing_factor": 0.1, "push_to_hub": False})


def test_a_key_of_a_later_release_is_refused():
    with pytest.raises(UsageError, match="surprise is a key of a release"):
        check_keys({"surprise": 1}, {"surprise"})
    check_keys({"surprise": 1}, FIELDS)  # TrainingArguments refuses it itself


# A value of each that differs from the default, and with which flags it has an effect.
VALUES = {
    "lr_scheduler_kwargs": {"num_cycles": 0.25},
    "optim_args": ("momentum=0.5", {"optim": "sgd"}),
    "adam_beta1": 0.8,
    "adam_beta2": 0.9,
    "adam_epsilon": 1e-6,
    "neftune_noise_alpha": 5.0,
    "tf32": False,
    "torch_empty_cache_steps": 2,
    "full_determinism": True,
    "debug": "underflow_overflow",
    "logging_strategy": "epoch",
    "logging_first_step": True,
    "logging_nan_inf_filter": False,
    "log_level": "error",
    "log_level_replica": "error",
    "log_on_each_node": False,
    "run_name": "a",
    "project": "b",
    "eval_delay": 1,
    "dataloader_num_workers": 1,
    "dataloader_persistent_workers": (True, {"keys": {"dataloader_num_workers": 1}}),
    "dataloader_prefetch_factor": (3, {"keys": {"dataloader_num_workers": 1}}),
    "dataloader_multiprocessing_context": ("spawn", {"keys": {"dataloader_num_workers": 1}}),
    "ddp_find_unused_parameters": False,
    "ddp_bucket_cap_mb": 30,
    "ddp_broadcast_buffers": False,
    "ddp_static_graph": True,
    "ddp_timeout": 900,
}


def test_each_key_that_is_heeded_has_a_value_here():
    assert VALUES.keys() | {"deepspeed", "ddp_backend"} == HEEDED  # those need a launcher


@pytest.mark.parametrize("key", sorted(VALUES.keys() & FIELDS))
def test_what_is_heeded_arrives(tmp_path, key):
    value, flags = VALUES[key] if isinstance(VALUES[key], tuple) else (VALUES[key], {})
    flags = dict(flags)
    arguments = build(tmp_path, {**flags.pop("keys", {}), key: value}, **flags)
    found = getattr(arguments, key)
    assert found == value or [getattr(one, "value", one) for one in found] == [value]
    assert value != next(field.default for field in fields(TrainingArguments) if field.name == key)


@pytest.mark.parametrize(
    ("keys", "flags", "message"),
    [
        ({"adam_beta1": 0.8}, {"optim": "sgd"}, "adam_beta1 has no effect with --optim sgd"),
        ({"optim_args": "momentum=0.5, colour=3"}, {"optim": "sgd"}, "optim_args colour=3 has no effect"),
        ({"optim_args": "momentum=0.5"}, {}, "optim_args momentum=0.5 has no effect with --optim adamw_torch_fused"),
        ({"lr_scheduler_kwargs": {"a": 1}}, {"lr_scheduler_type": "constant"}, "no effect with --lr-scheduler-type"),
        ({"lr_scheduler_kwargs": {"colour": 1}}, {}, "does not take these arguments: .*colour"),
        ({}, {"lr_scheduler_type": "cosine_with_min_lr"}, "does not take these arguments: .*min_lr"),
        ({}, {"optim": "adamw_bnb_8bit"}, "does not take these arguments: .*bitsandbytes"),
        ({}, {"optim": "galore_adamw"}, "does not take these arguments: .*"),
        ({}, {"optim": "lomo"}, "does not take these arguments: .*"),
        ({"adam_beta1": 1.5}, {}, "does not take these arguments: .*1.5"),
        ({"dataloader_num_workers": -1}, {}, "does not take these arguments: .*num_workers"),
        ({"dataloader_persistent_workers": True}, {}, "does not take these arguments: .*persistent_workers"),
        ({"dataloader_prefetch_factor": 2}, {}, "does not take these arguments: .*prefetch_factor"),
        (
            {"dataloader_num_workers": 1, "dataloader_multiprocessing_context": "wave"},
            {},
            "does not take these arguments: .*wave",
        ),
    ],
)  # fmt: skip
def test_what_would_fail_later_is_tried_before(tmp_path, keys, flags, message):
    with pytest.raises(UsageError, match=message):
        build(tmp_path, keys, **flags)


@pytest.mark.parametrize(
    ("name", "value", "flags", "message"),
    [
        ("ACCELERATE_MIXED_PRECISION", "fp16", {}, "mixed_precision fp16"),
        ("ACCELERATE_MIXED_PRECISION", "bf16", {"bf16": False}, "--no-bf16"),
        ("ACCELERATE_DYNAMO_BACKEND", "INDUCTOR", {}, "dynamo_backend"),
        ("ACCELERATE_USE_PARALLELISM_CONFIG", "true", {}, "parallelism_config"),
    ],
)
def test_a_launcher_that_says_otherwise(tmp_path, monkeypatch, name, value, flags, message):
    monkeypatch.setenv(name, value)
    with pytest.raises(UsageError, match=message):
        build(tmp_path, **flags)


def test_a_launcher_s_bfloat16_is_heard(tmp_path, monkeypatch):
    assert not build(tmp_path).bf16
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    assert build(tmp_path).bf16


def report_of(output):
    return json.loads((output / "transmla_finetune.json").read_text())


@pytest.mark.parametrize(
    "keys", ["{neftune_noise_alpha: 5}", "{adam_beta1: 0.5}", "{lr_scheduler_kwargs: {num_cycles: 3}}"]
)
def test_what_is_heeded_changes_the_training(train, converted, tmp_path, keys):
    (tmp_path / "recipe.yaml").write_text(f"training_arguments: {keys}\n")
    plain = report_of(train(converted, tmp_path / "plain", "--max-steps 4"))
    other = report_of(train(converted, tmp_path / "other", "--max-steps 4", "--config", tmp_path / "recipe.yaml"))
    assert plain["heldout"][0]["nll"] == pytest.approx(other["heldout"][0]["nll"], rel=1e-6)
    assert plain["heldout"][-1]["nll"] != pytest.approx(other["heldout"][-1]["nll"], rel=1e-7)
