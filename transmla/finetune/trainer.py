"""Transformers' Trainer with a teacher, native checkpoints that appear whole, and a stop where numbers go wrong."""

from __future__ import annotations

import math
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, default_collate
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState
from transformers.trainer_callback import PrinterCallback, ProgressCallback

from transmla.checkpoint.disk import fsync, output_errors
from transmla.errors import TrainingError, TransMLAError
from transmla.finetune.checkpoints import TRAINING_FOLDER, NativeWriter, save_trained
from transmla.finetune.data.order import pass_loader
from transmla.finetune.data.packing import Filler, PackedDataset
from transmla.finetune.distill.student import IGNORE_INDEX
from transmla.finetune.distill.teacher import TeacherOutputs
from transmla.finetune.report import copies_worse

CHECKPOINT = "checkpoint-{step}"


class TeacherSignal(Protocol):
    """Whoever says what a batch teaches."""

    def outputs_for(self, batch: Mapping[str, Tensor]) -> TeacherOutputs | None:
        """Return what there is to learn from a teacher, or nothing."""
        ...


class FinetuneTrainer(Trainer):
    """Trains a :class:`~transmla.finetune.distill.student.Student`.

    ``loss`` is what is minimized, ``nll`` and ``kl`` are its two parts, in nats a token. What is held out is measured
    in the same numbers; the best checkpoint is the one with the least ``eval_loss``.
    """

    control: TrainerControl

    def __init__(
        self,
        *args: Any,
        signal: TeacherSignal,
        writer: NativeWriter,
        trained_weights: Callable[[Mapping[str, Tensor]], dict[str, Tensor]],
        merged: Callable[[Mapping[str, Tensor]], dict[str, Tensor]],
        note: Callable[[dict[str, Any]], None],
        heldout_repeats: PackedDataset | None = None,
        **kwargs: Any,
    ) -> None:
        """Take what Trainer takes, and more.

        Args:
            args: for Trainer.
            signal: says what a batch teaches.
            writer: writes checkpoints.
            trained_weights: picks what is trained from a state.
            merged: makes of a state the weights that are written.
            note: is told of each checkpoint, once it is complete.
            heldout_repeats: sequences of repeats; no step that copies worse than the start is the best.
            kwargs: for Trainer.
        """
        super().__init__(*args, **kwargs)
        self.remove_callback(PrinterCallback)
        self.remove_callback(ProgressCallback)
        if self.args.device.type == "cpu":
            # To resume, Transformers 5.17 loads the optimizer to "cpu:1" in the second process; torch knows "cpu" only.
            self.args.__dict__["_setup_devices"] = torch.device("cpu")
        self._signal, self._writer, self._note = signal, writer, note
        self._heldout_repeats = heldout_repeats
        self._trained_weights, self._merged = trained_weights, merged
        self._parts = torch.zeros(2, device=self.args.device)
        self._started, self._last_logged = time.monotonic(), 0

    @property
    def folder(self) -> Path:
        """Return where checkpoints appear."""
        return Path(self.args.output_dir)

    def get_train_dataloader(self) -> DataLoader[Any]:
        """Return what loads batches; a stream is read by one process, which hands each of the others its share."""
        if isinstance(self.train_dataset, PackedDataset):
            return pass_loader(self.train_dataset, self.args)
        return super().get_train_dataloader()

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Tensor],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """Return the loss, so scaled that its mean over processes, and sum over batches, is the mean over tokens."""
        outputs = self._forward(model, inputs, num_items_in_batch)
        self._parts += torch.stack([outputs["nll"], outputs["kl"]]).detach()
        loss = outputs["loss"] * (self.accelerator.num_processes if num_items_in_batch is not None else 1)
        return (loss, outputs) if return_outputs else loss

    def _forward(self, model: nn.Module, inputs: Mapping[str, Tensor], count: Tensor | int | None) -> dict[str, Tensor]:
        return model(
            input_ids=inputs["input_ids"],
            position_ids=inputs["position_ids"],
            labels=inputs["labels"],
            teacher_outputs=self._signal.outputs_for(inputs),
            num_items_in_batch=count,
        )

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log the two parts of the loss as well."""
        if "loss" in logs:
            steps = self.state.global_step - self._last_logged
            nll, kl = (self.accelerator.reduce(self._parts, "sum") / steps).tolist()
            logs |= {"nll": nll, "kl": kl, "seconds": self.seconds}
            self._parts.zero_()
            self._last_logged = self.state.global_step
        super().log(logs, start_time)

    def train(self, resume_from_checkpoint: Any = None, *args: Any, **kwargs: Any) -> Any:
        """Train, and know how long an interrupted run has taken before."""
        if resume_from_checkpoint is not None:
            self.recall(resume_from_checkpoint)
        try:
            return super().train(resume_from_checkpoint, *args, **kwargs)
        except TransMLAError as error:
            # What a worker of a loader raises comes with its traceback in the message.
            name = f"{type(error).__module__}.{type(error).__qualname__}: "
            _, found, sentence = str(error).rpartition(name)
            if found:
                raise type(error)(sentence.strip()) from None
            raise

    def recall(self, folder: str) -> None:
        """Take up the state that a checkpoint has left in its folder for resuming."""
        self.state = TrainerState.load_from_json(str(Path(folder) / "trainer_state.json"))
        self._last_logged = self.state.global_step
        self._started -= max((entry.get("seconds", 0) for entry in self.state.log_history), default=0)

    @property
    def seconds(self) -> float:
        """Return how long the training has taken, over all its runs."""
        return round(time.monotonic() - self._started, 1)

    @torch.no_grad()
    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: list[str] | None = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """Measure what is held out; each process takes its share, and none is counted twice.

        ``eval_selection`` is the loss by which the best step is chosen: infinite where copying has suffered.
        """
        loss, nll, kl = self._measure(eval_dataset or self.eval_dataset)
        metrics = {"loss": loss, "nll": nll, "perplexity": math.exp(min(nll, 700)), "kl": kl, "seconds": self.seconds}
        metrics["selection"] = loss
        if self._heldout_repeats is not None:
            _, repeat_nll, _ = self._measure(self._heldout_repeats)
            measured = (entry["eval_repeat_nll"] for entry in self.state.log_history if "eval_repeat_nll" in entry)
            worse = copies_worse(repeat_nll, next(measured, None))
            metrics |= {"repeat_nll": repeat_nll, "selection": math.inf if worse else loss}
        metrics = {key if key == "seconds" else f"{metric_key_prefix}_{key}": metric for key, metric in metrics.items()}
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def _measure(self, dataset: PackedDataset) -> tuple[float, float, float]:
        """Return loss, nll and kl, means over the tokens that count."""
        model = self.model_wrapped
        model.eval()  # not joined to the line before: DeepSpeed's engine returns nothing
        sums = torch.zeros(4, device=self.args.device)
        for batch in self._shares(dataset):
            outputs = self._forward(model, batch, 1)
            counted = (batch["labels"][:, 1:] != IGNORE_INDEX).sum()
            sums += torch.stack([outputs["loss"], outputs["nll"], outputs["kl"], counted])
        *totals, count = self.accelerator.reduce(sums.double(), "sum").tolist()
        loss, nll, kl = (total / max(count, 1) for total in totals)
        return loss, nll, kl

    def _shares(self, dataset: PackedDataset) -> Iterator[dict[str, Tensor]]:
        """Yield this process's batches; where weights are gathered from all, all must run the model equally often."""
        processes, own = self.accelerator.num_processes, self.accelerator.process_index
        mine = []
        for first in range(0, len(dataset), processes):
            mine.append(dataset[first + own if first + own < len(dataset) else Filler(first)])
        size = self.args.per_device_eval_batch_size
        for start in range(0, len(mine), size):
            yield self._prepare_inputs(default_collate(mine[start : start + size]))

    def _clip_grad_norm(self, model: nn.Module) -> Any:
        """Stop before a gradient that is not finite gets into the weights; all processes see the same one."""
        norm = super()._clip_grad_norm(model)
        if not math.isfinite(float(norm)):
            self._save_checkpoint(model, None)
            kept = self.folder / CHECKPOINT.format(step=self.state.global_step)
            raise TrainingError(
                f"The gradient is not finite in step {self.state.global_step + 1}: the weights before it are in "
                f"{kept}, a model like any other. Lower --learning-rate, or look at the data, and start from there."
            )
        return norm

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """Write a checkpoint beside its place, and put it there by one rename."""
        name = CHECKPOINT.format(step=self.state.global_step)
        unfinished, finished = self.folder / f".{name}", self.folder / name
        training = unfinished / TRAINING_FOLDER
        with output_errors(finished):
            if self.args.should_save:
                shutil.rmtree(unfinished, ignore_errors=True)
                training.mkdir(parents=True)
            self.accelerator.wait_for_everyone()
            self.save_model(str(unfinished), _internal_call=True)
            self._save_optimizer_and_scheduler(str(training))
            self._save_scaler(str(training))
            self._save_rng_state(str(training))
            if self.args.should_save:
                self.state.save_to_json(str(training / "trainer_state.json"))
            self.accelerator.wait_for_everyone()
            if self.args.should_save:
                for path in [*unfinished.rglob("*"), unfinished]:
                    fsync(path)
                _delete(finished)
                unfinished.rename(finished)
                fsync(self.folder)
                self._note({"step": self.state.global_step})
                self._forget_old()
            self.accelerator.wait_for_everyone()

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Write the native checkpoint, and the trained weights as they are."""
        state = self.accelerator.get_state_dict(self.model_wrapped)
        if self.args.should_save:
            folder = Path(output_dir or self.args.output_dir)
            save_trained(folder / TRAINING_FOLDER, self._trained_weights(state))
            self._writer.write(folder, self._merged(state))

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        """Do nothing: trained weights are put into the model before anything wraps it."""

    def _forget_old(self) -> None:
        """Delete checkpoints, but for the best and the newest ones."""
        steps = sorted(steps_saved(self.folder))
        keep = {*steps[-self.args.save_total_limit :], self.state.best_global_step}
        for step in set(steps) - keep:
            _delete(self.folder / CHECKPOINT.format(step=step))


def _delete(checkpoint: Path) -> None:
    """Delete a checkpoint, if there is one; out of sight first, so that half of one never looks like one."""
    hidden = checkpoint.with_name(f".{checkpoint.name}.old")
    shutil.rmtree(hidden, ignore_errors=True)
    if checkpoint.exists():
        checkpoint.rename(hidden)
        shutil.rmtree(hidden, ignore_errors=True)


def steps_saved(folder: Path) -> list[int]:
    """Return the steps of which there are complete checkpoints."""
    return [int(path.name.rpartition("-")[2]) for path in folder.glob(CHECKPOINT.format(step="*"))]


class ReportingCallback(TrainerCallback):
    """Moves a bar, measures and saves at the end, and says what has been measured."""

    def __init__(self, advance: Callable[[int], None], tell: Callable[[str], None]) -> None:
        self._advance, self._tell = advance, tell

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Show what an interrupted run has done."""
        self._advance(state.global_step)

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Move on."""
        self._advance(1)
        if state.global_step >= state.max_steps:
            control.should_evaluate = control.should_save = True

    def on_evaluate(self, args: Any, state: Any, control: Any, metrics: Any = None, **_: Any) -> None:
        """Print it."""
        if state.is_world_process_zero:
            self._tell(
                f"step {state.global_step:,}: {state.num_input_tokens_seen:,} tokens seen; held out: perplexity "
                f"{metrics['eval_perplexity']:.4f}, KL {metrics['eval_kl']:.4f}"
            )
