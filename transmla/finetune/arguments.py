"""The request in the words of Transformers' Trainer."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from transformers import TrainingArguments

from transmla.config import FinetuneRequest
from transmla.device import choose_device
from transmla.errors import UsageError
from transmla.finetune.data.datasets import Data
from transmla.finetune.data.packing import PackedDataset
from transmla.finetune.trainer_keys import check_keys
from transmla.finetune.trial import check_heard, check_launcher, launched_precision, try_out


def training_arguments(request: FinetuneRequest, data: Data, work: Path) -> TrainingArguments:
    """Put the request into the words of Transformers' Trainer.

    Raises:
        UsageError: it does not take them.
    """
    device = choose_device(request.device)
    check_keys(request.training_arguments, {field.name for field in fields(TrainingArguments)})
    check_launcher(request)
    bf16 = request.bf16
    if bf16 is None:
        bf16 = launched_precision() == "bf16" or (device.type == "cuda" and torch.cuda.is_bf16_supported())
    given: dict[str, Any] = {
        name: getattr(request, name)
        for name in (
            "learning_rate",
            "lr_scheduler_type",
            "warmup_steps",
            "weight_decay",
            "max_grad_norm",
            "optim",
            "per_device_train_batch_size",
            "per_device_eval_batch_size",
            "gradient_accumulation_steps",
            "eval_steps",
            "logging_steps",
            "save_total_limit",
            "seed",
        )
    }
    own: dict[str, Any] = {
        "output_dir": str(work),
        "bf16": bf16,
        "use_cpu": device.type == "cpu",
        "max_steps": -1,
        "eval_strategy": "steps",
        "save_strategy": "steps",
        "save_steps": request.eval_steps,
        "metric_for_best_model": "eval_selection",
        "greater_is_better": False,
        "remove_unused_columns": False,
        "dataloader_pin_memory": device.type == "cuda",
        "include_num_input_tokens_seen": "all",
        "disable_tqdm": True,
        "report_to": list(request.report_to) or "none",
    }
    with _refusing():
        arguments = TrainingArguments(**given, **own, **request.training_arguments)
    # Several GPUs are for `accelerate launch`: copies of a model within one process cannot share a teacher.
    if arguments.n_gpu > 1:
        arguments._n_gpu = 1
    arguments.max_steps = _num_steps(request, data, arguments)
    with _refusing():
        try_out(arguments)
    check_heard(arguments, request.training_arguments)
    return arguments


@contextmanager
def _refusing() -> Iterator[None]:
    """Make a sentence of what Trainer, and what it builds, has to say."""
    try:
        yield
    # They fail in as many ways as there are optimizers and loggers.
    except Exception as error:
        raise UsageError(f"Trainer does not take these arguments: {' '.join(str(error).split())}") from None


def _num_steps(request: FinetuneRequest, data: Data, arguments: TrainingArguments) -> int:
    if request.max_steps is not None:
        return request.max_steps
    assert isinstance(data.train, PackedDataset)
    batches = math.ceil(len(data.train) / (arguments.train_batch_size * arguments.world_size))
    return math.ceil(request.num_train_epochs * math.ceil(batches / arguments.gradient_accumulation_steps))


def teacher_dtype(request: FinetuneRequest, arguments: TrainingArguments) -> str:
    """Return the type in which the teacher runs; ``auto`` is the stored one."""
    return "bfloat16" if request.teacher_dtype == "auto" and arguments.bf16 else request.teacher_dtype
