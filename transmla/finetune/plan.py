"""What a training would be: its size, its steps, its memory, told before a weight is read."""

from __future__ import annotations

import torch
from transformers import TrainingArguments

from transmla.checkpoint.publish import staging_folder
from transmla.checkpoint.reader import CheckpointReader
from transmla.config import FinetuneRequest
from transmla.finetune.arguments import teacher_dtype, training_arguments
from transmla.finetune.checkpoints import checkpoint_bytes
from transmla.finetune.data.packing import PackedDataset
from transmla.finetune.memory_estimate import Setting, estimate_memory
from transmla.finetune.prepare import Prepared, prepare
from transmla.finetune.report import FinetunePlan


def plan_finetune(request: FinetuneRequest, *, overwrite: bool = False) -> FinetunePlan:
    """Read the data and the headers, and add up.

    Raises:
        TransMLAError: the request cannot be carried out.
    """
    prepared = prepare(request, overwrite=overwrite)
    arguments = training_arguments(request, prepared.data, staging_folder(request.output_dir) / "work")
    memory = estimate_memory(
        prepared.config, _setting(prepared, arguments), teacher_bytes=_teacher_bytes(prepared, arguments)
    )
    train = prepared.data.train
    batch = arguments.train_batch_size * arguments.world_size * arguments.gradient_accumulation_steps
    weights = sum(header.nbytes for header in CheckpointReader(prepared.converted.folder).headers.values())
    return FinetunePlan(
        checkpoint=prepared.converted.name,
        teacher=prepared.teacher.name if prepared.teacher else None,
        output_dir=str(request.output_dir),
        train=request.train,
        num_trained_parameters=memory.num_trained,
        num_sequences=len(train) if isinstance(train, PackedDataset) else None,
        num_heldout_sequences=len(prepared.data.heldout),
        steps=arguments.max_steps,
        tokens_per_step=batch * request.window,
        memory=memory,
        checkpoint_bytes=checkpoint_bytes(weights, memory.num_trained),
        num_shared_tokens=None if prepared.shared is None else len(prepared.shared),
        not_learnt=prepared.data.told,
    )


def _setting(prepared: Prepared, arguments: TrainingArguments) -> Setting:
    request = prepared.request
    return Setting(
        train=request.train,
        lora_rank=request.lora_rank,
        batch_size=request.per_device_train_batch_size,
        window=request.window,
        bf16=arguments.bf16,
        checkpointing=request.gradient_checkpointing,
        on_cpu=arguments.device.type == "cpu",
        renormalized=prepared.shared is not None,
    )


def _teacher_bytes(prepared: Prepared, arguments: TrainingArguments) -> int:
    """Return what the teacher's weights take beside the student's."""
    request, teacher = prepared.request, prepared.teacher
    if teacher is None or request.teacher_top_k or request.teacher_device != "auto":
        return 0
    headers = CheckpointReader(teacher.folder).headers.values()
    dtype = teacher_dtype(request, arguments)
    if dtype == "auto":
        return sum(header.nbytes for header in headers)
    return sum(header.nbytes // header.dtype.itemsize * getattr(torch, dtype).itemsize for header in headers)
