"""The models of a training in memory, and what belongs to them."""

from __future__ import annotations

import math
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import Any

import accelerate
import torch
from accelerate.utils import DistributedType
from torch import Tensor
from torch.utils.data import ConcatDataset, default_collate
from transformers import PreTrainedModel, TrainingArguments
from transformers.integrations import deepspeed

from transmla.device import choose_device
from transmla.finetune.adapters import merge_adapters
from transmla.finetune.arguments import teacher_dtype
from transmla.finetune.checkpoints import TRAINING_FOLDER, NativeWriter, checkpoint_bytes, load_trained
from transmla.finetune.data.order import NextPass
from transmla.finetune.data.packing import PackedDataset, StreamedDataset
from transmla.finetune.distill.loss import Mix
from transmla.finetune.distill.signal import CachedSignal, NoSignal, OnlineSignal, cache_teacher_logits
from transmla.finetune.distill.student import Student
from transmla.finetune.distill.teacher import Teacher
from transmla.finetune.latent_norm import NUM_WINDOWS, fit_latent_norms
from transmla.finetune.parameters import choose_trained, take_types
from transmla.finetune.prepare import Prepared
from transmla.finetune.report import FinetuneReport, best_point, points_of
from transmla.finetune.trainer import CHECKPOINT, FinetuneTrainer, TeacherSignal
from transmla.modeling.load import load_model
from transmla.modeling.reparametrize import reparametrize
from transmla.progress import Progress
from transmla.records import FORMAT_VERSION
from transmla.versions import loaded_versions

_CE_WEIGHT, _HARD_LABEL_SHARE = 0.1, 0.2
_START = "start"


class Training:
    """A student, loaded and changed for training, with its teacher and its trainer."""

    def __init__(self, prepared: Prepared, arguments: TrainingArguments, progress: Progress, last: int | None) -> None:
        self.prepared, self.arguments, self.progress = prepared, arguments, progress
        request = self.request = prepared.request
        # A model that is sharded has weights of one type.
        halved = arguments.bf16 and not _is_sharded(arguments)
        dtype = "bfloat16" if halved and prepared.config.dtype == torch.bfloat16 else "float32"
        with _whole_models(arguments):
            model = load_model(prepared.converted, dtype=dtype, device=torch.device("cpu"))
        self.num_parameters = model.num_parameters()
        plain = reparametrize(model)
        if request.latent_norm == "fitted":
            plain = fit_latent_norms(model.to(arguments.device), plain, self._some_batches())
        self.writer = NativeWriter(prepared.converted, model, plain, max_shard_size=request.max_shard_size)
        self.trained = choose_trained(model, request.train, lora_rank=request.lora_rank, lora_alpha=request.lora_alpha)
        take_types(model, halved=halved)
        if last is not None:
            load_trained(Path(arguments.output_dir) / CHECKPOINT.format(step=last) / TRAINING_FOLDER, model)
        elif request.latent_norm == "fitted" and arguments.process_index == 0:
            # Not what came in any more, and perhaps the best that there will be.
            (start := Path(arguments.output_dir) / _START).mkdir(exist_ok=True)
            self.writer.write(start, self.merged(model.state_dict()))
        self.num_trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
        if request.gradient_checkpointing:
            # Its name since Transformers 5.2x; the old one warns.
            getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)()
        self.model = model

    def _some_batches(self) -> list[dict[str, Tensor]]:
        train = self.prepared.data.train
        if isinstance(train, StreamedDataset):
            windows = list(islice(train, NUM_WINDOWS))
        else:
            windows = [train[index] for index in range(min(NUM_WINDOWS, len(train)))]
        size = self.arguments.per_device_eval_batch_size
        return [default_collate(windows[start : start + size]) for start in range(0, len(windows), size)]

    @property
    def checkpoint_bytes(self) -> int:
        """Return what a checkpoint takes on the disk, with all that resuming needs."""
        return checkpoint_bytes(self.writer.nbytes, self.num_trained)

    def teacher_signal(self, folder: Path, note: Callable[[dict[str, Any]], None]) -> tuple[TeacherSignal, float]:
        """Load the teacher, or have it cache its logits; ``note`` is told when there is work to be kept.

        Returns:
            What the teacher says of a batch, and the student's residual stream as a multiple of the teacher's.
        """
        prepared, request = self.prepared, self.request
        if prepared.teacher is None:
            return NoSignal(), 1.0
        device = self.arguments.device if request.teacher_device == "auto" else choose_device(request.teacher_device)
        with _whole_models(self.arguments):
            dtype = teacher_dtype(request, self.arguments)
            model = load_model(prepared.teacher, dtype=dtype, device=device, flag="--teacher-dtype")
        teacher = Teacher(model, match_attention=request.attention_weight > 0, shared=prepared.shared)
        stream = math.sqrt(_stream_eps(self.model) / teacher.stream_eps)
        if request.teacher_top_k is None:
            return OnlineSignal(teacher), stream
        data = prepared.data
        assert isinstance(data.train, PackedDataset)
        if self.arguments.process_index == 0:
            note({"teacher": prepared.teacher.name})
            read = [part for part in (data.heldout, data.train, data.heldout_repeats) if part is not None]
            with self.progress.task("Asking the teacher", sum(map(len, read))) as advance:
                cache_teacher_logits(
                    teacher,
                    ConcatDataset(read),
                    folder,
                    top=min(request.teacher_top_k, prepared.num_taught),
                    temperature=request.temperature,
                    batch_size=self.arguments.per_device_eval_batch_size,
                    device=self.arguments.device,
                    advance=advance,
                )
        self.arguments.distributed_state.wait_for_everyone()
        return CachedSignal(folder, shared=prepared.shared), stream

    def trainer(
        self, signal: TeacherSignal, note: Callable[[dict[str, Any]], None], *, stream: float
    ) -> FinetuneTrainer:
        """Make a student of the model, and its trainer."""
        request = self.request
        ce_weight = request.ce_weight
        if ce_weight is None:
            ce_weight = 1.0 if self.prepared.teacher is None else _CE_WEIGHT
        hard_label_share = _HARD_LABEL_SHARE if request.hard_label_share is None else request.hard_label_share
        Student.from_model(
            self.model,
            Mix(ce_weight, request.temperature, hard_label_share),
            attention_weight=request.attention_weight,
            stream=stream,
        )
        train = self.prepared.data.train
        # What a teacher has written down is about the sequences that it has read.
        recut = not isinstance(signal, CachedSignal)
        return FinetuneTrainer(
            self.model,
            self.arguments,
            callbacks=[NextPass(train, recut=recut)] if isinstance(train, PackedDataset) else [],
            train_dataset=train,
            eval_dataset=self.prepared.data.heldout,
            heldout_repeats=self.prepared.data.heldout_repeats,
            signal=signal,
            writer=self.writer,
            trained_weights=lambda state: {name: state[name] for name in self.trained},
            merged=self.merged,
            note=note,
        )

    def merged(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return the trained weights under their native names."""
        if self.request.train == "lora":
            return merge_adapters(state, self.trained, scale=self.request.lora_alpha / self.request.lora_rank)
        return {name: state[name] for name in self.trained}

    def write_best(self, report: FinetuneReport, folder: Path) -> None:
        """Put the best weights into a folder: those of a checkpoint, or those of the start where none was better."""
        work = Path(self.arguments.output_dir)
        best = work / CHECKPOINT.format(step=report.best_step) if report.best_step else work / _START
        if best.is_dir():
            # Not moved: whenever the process is killed, the checkpoint must be whole.
            shutil.copytree(
                best, folder, copy_function=_link, ignore=shutil.ignore_patterns(TRAINING_FOLDER), dirs_exist_ok=True
            )
        else:
            # Nothing has been trained, or not for the better: what came in.
            self.writer.write(folder, {} if report.steps else self.merged(self.model.state_dict()))

    def report(self, trainer: FinetuneTrainer) -> FinetuneReport:
        """Return what was measured."""
        prepared, request, state = self.prepared, self.request, trainer.state
        heldout, training = points_of(state.log_history)
        train = prepared.data.train
        return FinetuneReport(
            format_version=FORMAT_VERSION,
            checkpoint=prepared.converted.name,
            teacher=prepared.teacher.name if prepared.teacher else None,
            num_shared_tokens=None if prepared.shared is None else len(prepared.shared),
            not_learnt=prepared.data.told,
            num_parameters=self.num_parameters,
            num_trained_parameters=self.num_trained,
            num_sequences=len(train) if isinstance(train, PackedDataset) else None,
            num_heldout_sequences=len(prepared.data.heldout),
            num_heldout_repeats=len(prepared.data.heldout_repeats or ()),
            window=request.window,
            sha256=prepared.data.sha256,
            steps=state.global_step,
            best_step=best_point(heldout).step if heldout else 0,
            heldout=heldout,
            training=training,
            num_processes=self.arguments.world_size,
            request=request.model_dump(mode="json"),
            versions=loaded_versions().model_dump() | {"accelerate": accelerate.__version__},
        )


def _link(source: str, target: str) -> None:
    """Have a file in two places without copying it, where the file system can."""
    Path(target).unlink(missing_ok=True)
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)


def _stream_eps(model: PreTrainedModel) -> float:
    norm: Any = model.get_decoder().norm
    return norm.variance_epsilon


@contextmanager
def _whole_models(arguments: TrainingArguments) -> Iterator[None]:
    """Load models whole on every process, ZeRO-3 or not: the weights are rewritten before they are sharded."""
    plugin = arguments.deepspeed_plugin
    if plugin is None:
        yield
        return
    deepspeed.unset_hf_deepspeed_config()
    try:
        yield
    finally:
        plugin.set_deepspeed_weakref()


def _is_sharded(arguments: TrainingArguments) -> bool:
    return arguments.distributed_state.distributed_type in (DistributedType.FSDP, DistributedType.DEEPSPEED)
