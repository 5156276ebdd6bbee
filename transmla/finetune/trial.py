"""What a training would miss or ignore once all weights are there is found before: everything is built once, small."""

from __future__ import annotations

import copy
import os
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import fields
from typing import Any

import torch
from accelerate.utils import DynamoBackend, TorchDynamoPlugin
from torch.utils.data import DataLoader, TensorDataset
from transformers import Trainer, TrainingArguments, get_scheduler
from transformers.integrations import get_reporting_integration_callbacks

from transmla.config import FinetuneRequest
from transmla.errors import UsageError
from transmla.finetune.data.order import worker_options

_WITHOUT_OPTIONS = ("constant", "constant_with_warmup")
_OF_THE_OPTIMIZER = ("adam_beta1", "adam_beta2", "adam_epsilon")


def try_out(arguments: TrainingArguments) -> None:
    """Build loggers, optimizer, scheduler and loader; they raise whatever they have to say."""
    for callback in get_reporting_integration_callbacks(arguments.report_to):
        callback()
    optimizer_class, options = _optimizer(arguments)
    # Some need the model itself.
    if isinstance(optimizer_class, type) and issubclass(optimizer_class, torch.optim.Optimizer):
        get_scheduler(
            arguments.lr_scheduler_type,
            optimizer_class([torch.nn.Parameter(torch.zeros(2, 2))], **options),
            num_warmup_steps=arguments.get_warmup_steps(arguments.max_steps),
            num_training_steps=arguments.max_steps,
            scheduler_specific_kwargs=arguments.lr_scheduler_kwargs,
        )
    with warnings.catch_warnings():
        # The real one will say it again.
        warnings.simplefilter("ignore")
        DataLoader(TensorDataset(torch.zeros(1)), **worker_options(arguments))


def check_heard(arguments: TrainingArguments, given: Mapping[str, Any]) -> None:
    """Refuse options of an optimizer or a scheduler that does not have them.

    Raises:
        UsageError: there are some.
    """
    kind = arguments.lr_scheduler_type.value
    if arguments.lr_scheduler_kwargs and kind in _WITHOUT_OPTIONS:
        raise UsageError(f"training_arguments: lr_scheduler_kwargs has no effect with --lr-scheduler-type {kind}.")
    heard = _optimizer(arguments)
    if deaf := [name for name, other in _variants(arguments, given) if _optimizer(other) == heard]:
        raise UsageError(
            f"training_arguments: {', '.join(deaf)} has no effect with --optim {arguments.optim.value}: leave it out."
        )


def _variants(arguments: TrainingArguments, given: Mapping[str, Any]) -> Iterator[tuple[str, TrainingArguments]]:
    """Yield the arguments without each one of the options of an optimizer, by the name of what is left out."""
    defaults = {field.name: field.default for field in fields(arguments)}
    pairs = arguments.optim_args.split(",") if arguments.optim_args else []
    without: list[tuple[str, str, Any]] = [
        (f"optim_args {pair.strip()}", "optim_args", ",".join(p for p in pairs if p != pair)) for pair in pairs
    ]
    without += [(name, name, defaults[name]) for name in _OF_THE_OPTIMIZER if name in given]
    for name, field, value in without:
        if getattr(arguments, field) != value:
            other = copy.copy(arguments)
            setattr(other, field, value)
            yield name, other


def _optimizer(arguments: TrainingArguments) -> tuple[Any, Any]:
    return Trainer.get_optimizer_cls_and_kwargs(arguments)


def launched_precision() -> str:
    """Return what ``accelerate launch`` has been told of mixed precision."""
    return os.environ.get("ACCELERATE_MIXED_PRECISION", "no")


def check_launcher(request: FinetuneRequest) -> None:
    """Refuse what ``accelerate launch`` has been told, and the training cannot do.

    Raises:
        UsageError: there is something.
    """
    precision = launched_precision()
    if precision not in ("no", "bf16"):
        raise UsageError(
            f"accelerate launch says mixed_precision {precision}; a training here has bf16 or none: change its config, "
            "or pass it --mixed_precision bf16."
        )
    if precision == "bf16" and request.bf16 is False:
        raise UsageError("accelerate launch says mixed_precision bf16, and --no-bf16 the opposite: drop one of them.")
    if TorchDynamoPlugin().backend is not DynamoBackend.NO:
        raise UsageError(
            "accelerate launch says dynamo_backend, and a compiled model has other names for its weights, so that the "
            "first checkpoint would fail: take it out of its config."
        )
    if os.environ.get("ACCELERATE_USE_PARALLELISM_CONFIG", "false").lower() == "true":
        raise UsageError(
            "accelerate launch says parallelism_config: a training here splits data and weights (FSDP, DeepSpeed) and "
            "nothing else; configs/accelerate/fsdp.yaml is a config that fits."
        )
