"""EleutherAI's lm-eval, put to a model.

Every task, metric, filter and group has its value, or is named with the reason why not; a task of which nothing has a
value is an error, and what lm-eval warns of is told.
"""

from __future__ import annotations

import sys
from contextlib import nullcontext, redirect_stderr
from io import StringIO
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from transmla.data.tokens import check_known
from transmla.errors import DataError, listed
from transmla.evaluate.lazy_model import LazyModel
from transmla.evaluate.tasks.item_files import TASK_FILES
from transmla.evaluate.tasks.open_task import failures, open_task
from transmla.evaluate.tasks.outcomes import all_outcomes, guard
from transmla.evaluate.tasks.scores import Outcome
from transmla.generate.generation_config import read_settings
from transmla.progress import Progress, Silent
from transmla.records import Record


class Answers(Record):
    """What a model made of a task: its outcomes, and what must be told about them."""

    outcomes: tuple[Outcome, ...]
    notes: tuple[str, ...]


def run_task(
    task: str,
    lazy: LazyModel,
    tokenizer: PreTrainedTokenizerBase,
    *,
    num_fewshot: int | None,
    limit: int | None,
    batch_size: int,
    progress: Progress,
) -> Answers:
    """Have lm-eval put one task, or a group of them, to a model.

    Raises:
        DataError: lm-eval cannot run it, or nothing of it has a value.
    """
    from lm_eval import simple_evaluate

    path = Path(task)
    # lm-eval and datasets draw bars of their own, and not all of them can be switched off.
    hush = redirect_stderr(StringIO()) if isinstance(progress, Silent) else nullcontext()
    with (
        progress.task(f"{lazy.name} answers {path.stem if path.suffix in TASK_FILES else task}", 1) as advance,
        hush,
        open_task(task) as opened,
    ):
        notes = opened.notes
        fixed = [name for name, one in opened.tasks.items() if one.get_config("num_fewshot") == 0]
        if num_fewshot and fixed:
            notes.append(
                f"--num-fewshot {num_fewshot} does not apply to {listed(fixed, most=3)}: the task says 0, and means it."
            )
        guard(opened)
        with failures(task):
            found = simple_evaluate(
                _answerer(lazy, tokenizer, batch_size),
                tasks=opened.roots,
                task_manager=opened.manager,
                num_fewshot=num_fewshot,
                limit=limit,
                bootstrap_iters=0,
            )
        outcomes = all_outcomes(opened, found, notes)
        advance(1)
    if not outcomes:
        raise DataError(f"The task {task} has no value for {lazy.name}: {' '.join(notes) or 'it has no metric.'}")
    return Answers(outcomes=outcomes, notes=tuple(dict.fromkeys(notes)))


def _answerer(lazy: LazyModel, tokenizer: PreTrainedTokenizerBase, batch_size: int) -> Any:
    from lm_eval.models.huggingface import HFLM

    class Answerer(HFLM):
        """Has a model generate as its own config asks for, and looks at tokens before the model does."""

        def tok_encode(self, *args: Any, **kwargs: Any) -> list[int]:
            tokens: list[int] = super().tok_encode(*args, **kwargs)
            check_known(torch.tensor(tokens), vocab_size=vocab_size)
            return tokens

        def tok_batch_encode(self, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
            tokens, mask = super().tok_batch_encode(*args, **kwargs)
            check_known(tokens, vocab_size=vocab_size)
            return tokens, mask

        def _model_generate(self, *args: Any, **kwargs: Any) -> Any:
            while notes:
                print(notes.pop(0), file=sys.stderr)
            return super()._model_generate(*args, **kwargs)

    vocab_size = lazy.model.config.vocab_size
    settings = read_settings(lazy.found, vocab_size=vocab_size)
    notes = list(settings.notes)
    lazy.model.generation_config = settings.config()
    return Answerer(pretrained=lazy.model, tokenizer=tokenizer, batch_size=batch_size)
