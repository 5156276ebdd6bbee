"""Tasks of EleutherAI's lm-eval, the same items for all models, so that differences can be told from noise.

A task is one that lm-eval knows by name, a YAML file as lm-eval has them, or a JSONL file of items, which needs no
network: ``{"query": …, "choices": […], "gold": index}``, where a choice follows the query behind a space;
``{"contexts": […], "continuation": …, "gold": index}``, where the likeliest context is chosen; or ``{"query": …,
"answer": …}``, where the answer must be the likeliest continuation.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
import sys
from collections.abc import Sequence
from contextlib import nullcontext, redirect_stderr
from importlib.metadata import version
from io import StringIO
from pathlib import Path
from typing import Any

import numpy
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from transmla.data.tokens import check_known
from transmla.errors import DataError, TransMLAError, UsageError
from transmla.evaluate.eval_report import TaskReport, TaskScore
from transmla.evaluate.generation_config import read_settings
from transmla.evaluate.results import Results
from transmla.evaluate.subjects import Subject
from transmla.progress import Progress, Silent

Samples = dict[str, dict[str, list[float]]]
"""By task and metric what each item gave, in the order of the items."""

_FILES = {".yaml", ".yml", ".jsonl"}
_FORMS: dict[tuple[str, ...], dict[str, Any]] = {
    ("query", "choices", "gold"): {
        "output_type": "multiple_choice",
        "doc_to_text": "{{query}}",
        "doc_to_choice": "choices",
        "doc_to_target": "gold",
        "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}],
    },
    ("contexts", "continuation", "gold"): {
        "output_type": "multiple_choice",
        "doc_to_text": "gold",
        "doc_to_choice": "contexts",
        "doc_to_target": "continuation",
        "metric_list": [{"metric": "acc"}],
    },
    ("query", "answer"): {
        "output_type": "loglikelihood",
        "doc_to_text": "{{query}}",
        "doc_to_target": "{{answer}}",
        "metric_list": [{"metric": "acc"}],
    },
}


def check_tasks(tasks: Sequence[str]) -> None:
    """Refuse, before anything is loaded, tasks that cannot be run.

    Raises:
        UsageError: lm-eval is missing.
        DataError: a file is missing or not of the form.
    """
    if not tasks:
        return
    try:
        import lm_eval  # noqa: F401
    except ImportError:
        raise UsageError("--tasks needs lm-eval: pip install 'transmla[eval]', or drop --tasks.") from None
    for task in tasks:
        path = Path(task)
        if path.suffix in _FILES and not path.is_file():
            raise DataError(f"There is no task file {task}: pass a YAML or JSONL file, or the name of a task.")
        if path.suffix == ".jsonl":
            _jsonl_config(path)


class TasksPart:
    """Tasks, answered by all models."""

    field = "tasks"

    def __init__(
        self,
        tasks: Sequence[str],
        tokenizer: PreTrainedTokenizerBase,
        *,
        results: Results,
        source: Subject,
        num_fewshot: int | None,
        limit: int | None,
        batch_size: int,
    ) -> None:
        """Take tasks.

        Args:
            tasks: names or files.
            tokenizer: of all models.
            results: where what is known lies.
            source: that the others are compared with.
            num_fewshot: solved items before each; by default what the task says.
            limit: items of each task; all by default.
            batch_size: of lm-eval.
        """
        self._tasks, self._tokenizer, self._results, self._source = tasks, tokenizer, results, source
        self._options = {"num_fewshot": num_fewshot, "limit": limit}
        self._batch_size = batch_size
        self._found: dict[str, list[tuple[str, Samples]]] = {task: [] for task in tasks}

    def measure(self, subject: Subject, progress: Progress) -> None:
        """Have a model answer all tasks."""
        for task in self._tasks:
            key = {"what": "task", **subject.key, **self._options, "task": _identity(task)}
            key["lm_eval"] = version("lm_eval")

            def answer(task: str = task) -> Samples:
                return run_task(
                    task,
                    subject,
                    self._tokenizer,
                    batch_size=self._batch_size,
                    progress=progress,
                    **self._options,
                )

            self._found[task].append((subject.name, self._results.record(key, answer)))

    def report(self) -> list[TaskReport]:
        """Put everything together: a record for each task and metric."""
        reports = []
        for models in self._found.values():
            source = models[0][1]
            for task, metrics in source.items():
                reports += [
                    TaskReport(
                        task=task,
                        metric=metric,
                        num_items=len(values),
                        scores=tuple(
                            task_score(name, samples[task][metric], None if samples is source else values)
                            for name, samples in models
                        ),
                    )
                    for metric, values in metrics.items()
                ]
        return reports


def task_score(name: str, values: Sequence[float], source: Sequence[float] | None) -> TaskScore:
    """Return a model's mean over items, and its difference to the source's on the same items.

    The items are what is random: a difference that comes from few of them, or is evened out by others, has a standard
    error as large as itself, however many items both models agree about.
    """
    items = numpy.asarray(values, dtype=numpy.float64)
    score: dict[str, Any] = {"model": name, "value": float(items.mean()), "standard_error": _standard_error(items)}
    if source is not None:
        difference = items - numpy.asarray(source, dtype=numpy.float64)
        error = _standard_error(difference)
        score |= {"difference": float(difference.mean()), "difference_se": error}
        score["p_value"] = _p_value(score["difference"], error)
    return TaskScore(**score)


def _standard_error(values: numpy.ndarray) -> float | None:
    return float(values.std(ddof=1) / math.sqrt(len(values))) if len(values) > 1 else None


def _p_value(difference: float, error: float | None) -> float | None:
    """Return how likely a difference this large is, in either direction, where there is none (normal distribution)."""
    if error is None:
        return None
    if error == 0:
        return 1.0 if difference == 0 else 0.0
    return math.erfc(abs(difference) / error / math.sqrt(2))


def run_task(
    task: str,
    subject: Subject,
    tokenizer: PreTrainedTokenizerBase,
    *,
    num_fewshot: int | None,
    limit: int | None,
    batch_size: int,
    progress: Progress,
) -> Samples:
    """Have lm-eval put one task, or a group of them, to a model.

    Raises:
        DataError: lm-eval does not know it, or cannot get its items.
    """
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    path = Path(task)
    manager: Any
    wanted: Any
    if path.suffix == ".jsonl":
        manager, wanted = TaskManager(include_defaults=False), _jsonl_config(path)
    elif path.suffix in _FILES:
        manager, wanted = TaskManager(include_path=str(path.parent), include_defaults=False), str(path)
    else:
        manager, wanted = TaskManager(), task
    # lm-eval and datasets draw bars of their own, and not all of them can be switched off.
    hush = redirect_stderr(StringIO()) if isinstance(progress, Silent) else nullcontext()
    with progress.task(f"{subject.name} answers {path.stem if path.suffix in _FILES else task}", 1) as advance, hush:
        try:
            found = simple_evaluate(
                _answerer(subject, tokenizer, batch_size),
                tasks=[wanted],
                num_fewshot=num_fewshot,
                limit=limit,
                bootstrap_iters=0,
                task_manager=manager,
            )
        except TransMLAError:
            raise
        # Names that nobody knows, data sets that cannot be fetched: lm-eval and datasets fail in many ways.
        except Exception as error:
            reason = " ".join(str(error).split())
            raise DataError(f"lm-eval cannot run the task {task}: {reason or type(error).__name__}") from error
        advance(1)
    return {name: _metrics(samples) for name, samples in found["samples"].items()}


def _answerer(subject: Subject, tokenizer: PreTrainedTokenizerBase, batch_size: int) -> Any:
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

    vocab_size = subject.model.config.vocab_size
    settings = read_settings(subject.found, vocab_size=vocab_size)
    notes = list(settings.notes)
    subject.model.generation_config = settings.config()
    return Answerer(pretrained=subject.model, tokenizer=tokenizer, batch_size=batch_size)


def _metrics(samples: Sequence[dict[str, Any]]) -> dict[str, list[float]]:
    """Return the metrics that are means over items."""
    # Several answers to one question are filtered in several ways; the first is what lm-eval shows first.
    first = [sample for sample in samples if sample["filter"] == samples[0]["filter"]]
    ordered = sorted(first, key=lambda sample: sample["doc_id"])
    names = [name for name in ordered[0]["metrics"] if _is_number(ordered[0][name])]
    return {name: [float(sample[name]) for sample in ordered] for name in names if name != "perplexity"}


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float | numpy.number | numpy.bool_)


def _jsonl_config(path: Path) -> dict[str, Any]:
    """Describe a file of items in lm-eval's terms.

    Raises:
        DataError: it is not of one of the forms.
    """
    try:
        with path.open(encoding="utf-8") as file:
            fields = set(json.loads(file.readline()))
    except (OSError, ValueError, TypeError) as error:
        raise DataError(f"The task file {path} cannot be read: {error}.") from None
    form = next((form for needed, form in _FORMS.items() if set(needed) <= fields), None)
    if form is None:
        raise DataError(
            f"The task file {path} has items of {', '.join(sorted(fields))}; needed are "
            f"{'; or '.join(', '.join(needed) for needed in _FORMS)}."
        )
    return {
        "task": path.stem,
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(path.absolute())}},
        "test_split": "test",
        **form,
    }


def _identity(task: str) -> str:
    """Return what tells a task apart: its name, or what is in its file."""
    path = Path(task)
    return hashlib.sha256(path.read_bytes()).hexdigest() if path.suffix in _FILES else task
