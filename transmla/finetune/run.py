"""The spine: find the models, read the data; load, train, publish the best.

Under ``accelerate launch`` every process runs all of it; one of them writes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import Any

from accelerate.utils import broadcast_object_list
from transformers import TrainerCallback

from transmla.checkpoint.checksums import weight_checksums
from transmla.checkpoint.disk import output_errors
from transmla.checkpoint.publish import Staging, check_free_space, staging_folder
from transmla.config import FinetuneRequest
from transmla.device import reuse_memory
from transmla.errors import TransMLAError
from transmla.finetune.arguments import training_arguments
from transmla.finetune.checkpoints import TRAINING_FOLDER
from transmla.finetune.model_card import publish_texts
from transmla.finetune.prepare import prepare, renamed_facts
from transmla.finetune.report import FinetuneReport
from transmla.finetune.setup import Training
from transmla.finetune.trainer import CHECKPOINT, ReportingCallback, steps_saved
from transmla.progress import Progress, Silent, say_nothing


def _keep_nothing(entry: dict[str, Any]) -> None:
    pass


def finetune(
    request: FinetuneRequest,
    *,
    progress: Progress | None = None,
    tell: Callable[[str], None] = say_nothing,
    warn: Callable[[str], None] = say_nothing,
    callbacks: Sequence[TrainerCallback] = (),
    resume: bool = False,
    overwrite: bool = False,
) -> FinetuneReport:
    """Train a converted checkpoint and publish the best weights as one of the same format.

    Args:
        request: what is wanted.
        progress: who is told how far the work has come.
        tell: who is told what has been measured meanwhile.
        warn: who is told, before, what may not be as expected.
        callbacks: further ones for Transformers' Trainer.
        resume: continue an interrupted run of the same request from its last checkpoint.
        overwrite: replace an output folder that exists.

    Raises:
        TransMLAError: the request cannot be carried out, or the training went wrong. No output appears; checkpoints of
            a run that can be continued are kept beside it.
    """
    prepared = prepare(request, overwrite=overwrite)
    progress = progress or Silent()
    reuse_memory()
    work = staging_folder(request.output_dir) / "work"
    arguments = training_arguments(request, prepared.data, work)
    with ExitStack() as stack:
        staging, last, note, refusal = None, None, _keep_nothing, None
        if arguments.process_index == 0:
            identity = prepared.identity(arguments)
            try:
                staging = stack.enter_context(
                    Staging(
                        request.output_dir, identity=identity, resume=resume, overwrite=overwrite, renamed=renamed_facts
                    )
                )
                last = max(steps_saved(work), default=None)
                note = staging.journal.append
            except TransMLAError as error:
                refusal = error
        # The others must not look before the folder is there, nor find what is deleted, nor wait for who has gone.
        last, refusal = broadcast_object_list([last, refusal])
        if refusal is not None:
            raise refusal
        if arguments.process_index == 0:
            for notice in filter(None, (prepared.notice, *prepared.data.told)):
                warn(notice)
        arguments.eval_on_start = last is None
        training = Training(prepared, arguments, progress, last)
        if staging is not None and last is None:
            # The best, the newest, and one that is being written.
            check_free_space(request.output_dir, (request.save_total_limit + 2) * training.checkpoint_bytes)
        signal, stream = training.teacher_signal(work / "teacher", note)
        trainer = training.trainer(signal, note, stream=stream)
        resumed = None if last is None else str(work / CHECKPOINT.format(step=last) / TRAINING_FOLDER)
        if (last or 0) < arguments.max_steps:
            with progress.task("Training", arguments.max_steps) as advance:
                for callback in (ReportingCallback(advance, tell), *callbacks):
                    trainer.add_callback(callback)
                trainer.train(resumed)
        elif resumed is not None:
            # Interrupted when all was done but the publishing.
            trainer.recall(resumed)
        report = training.report(trainer)
        if staging is not None:
            with output_errors(staging.folder):
                training.write_best(report, staging.folder)
            report = report.model_copy(update={"checksums": weight_checksums(staging.folder, progress=progress)})
            publish_texts(request, report, converted=prepared.converted.folder, work=work, folder=staging.folder)
            staging.publish()
        trainer.accelerator.wait_for_everyone()
    return report
