"""Tasks of EleutherAI's lm-eval, the same items for all models, so that differences can be told from noise.

A task is one that lm-eval knows by name, a YAML file as lm-eval has them, or a JSONL file of items, which needs no
network: ``{"query": …, "choices": […], "gold": index}``, where a choice follows the query after a space;
``{"contexts": […], "continuation": …, "gold": index}``, where the likeliest context is chosen; or ``{"query": …,
"answer": …}``, where the answer must be the likeliest continuation.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy
from transformers import PreTrainedTokenizerBase

from transmla.config import EvalRequest
from transmla.errors import DataError, UsageError
from transmla.evaluate.lazy_model import LazyModel
from transmla.evaluate.parts.base import Part, Setting
from transmla.evaluate.report.svg import as_svg, new_figure
from transmla.evaluate.report.text_table import Shown, TextTable, with_error
from transmla.evaluate.result_cache import ResultCache
from transmla.evaluate.tasks.harness import Answers, run_task
from transmla.evaluate.tasks.item_files import TASK_FILES, items_config
from transmla.evaluate.tasks.open_task import open_task
from transmla.evaluate.tasks.report import TaskReport, TaskScore
from transmla.evaluate.tasks.scores import score_outcomes
from transmla.progress import Progress

SIGNIFICANT = 0.05
"""Probability below which a difference is not taken for noise."""


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
        if path.suffix in TASK_FILES and not path.is_file():
            raise DataError(f"There is no task file {task}: pass a YAML or JSONL file, or the name of a task.")
        if path.suffix == ".jsonl":
            items_config(path)


class TasksPart(Part):
    """Tasks, answered by all models."""

    name = "tasks"
    record = TaskReport
    flags = ("--tasks",)

    @classmethod
    def wanted(cls, request: EvalRequest) -> bool:
        """Return whether there are tasks."""
        return bool(request.tasks)

    @classmethod
    def check(cls, request: EvalRequest) -> None:
        """Refuse tasks that cannot be run."""
        check_tasks(request.tasks)

    @classmethod
    def build(cls, setting: Setting) -> Iterator[Part]:
        """Yield one part for all tasks."""
        request = setting.request
        if request.bos in ("always", "never"):
            setting.tell(f"--bos {request.bos} does not reach --tasks, whose texts begin as the tokenizer has them.")
        yield cls(
            request.tasks,
            setting.tokenizer,
            results=setting.cache,
            source=setting.source,
            num_fewshot=request.num_fewshot,
            limit=request.limit,
            batch_size=request.batch_size,
        )

    @classmethod
    def tables(cls, records: Sequence[TaskReport], shown: Shown) -> Iterator[TextTable]:
        """Yield a table of all tasks."""
        if records:
            yield _tasks_table(records, shown.names)

    @classmethod
    def plots(cls, records: Sequence[TaskReport], shown: Shown) -> Iterator[tuple[str, str]]:
        """Yield the differences to the source."""
        if records and len(shown.names) > 1:
            yield "Tasks: differences to the source, with 95 % intervals", _tasks_plot(records, shown.names)

    def __init__(
        self,
        tasks: Sequence[str],
        tokenizer: PreTrainedTokenizerBase,
        *,
        results: ResultCache,
        source: LazyModel,
        num_fewshot: int | None,
        limit: int | None,
        batch_size: int,
    ) -> None:
        """Take tasks.

        Args:
            tasks: names or files.
            tokenizer: of all models, which is the source's.
            results: where what is known lies.
            source: that the others are compared with.
            num_fewshot: solved items before each; by default what the task says.
            limit: items of each task; all by default.
            batch_size: of lm-eval.
        """
        self._tasks, self._tokenizer, self._results, self._source = tasks, tokenizer, results, source
        self._options = {"num_fewshot": num_fewshot, "limit": limit}
        self._batch_size = batch_size
        self._identities: dict[str, str] = {}
        self._found: dict[str, list[tuple[str, Answers]]] = {task: [] for task in tasks}

    def measure(self, lazy: LazyModel, progress: Progress) -> None:
        """Have a model answer all tasks, and tell what they leave out."""
        for task in self._found:
            key = {
                "what": "task",
                **lazy.key,
                **self._options,
                "task": self._identity(task, progress),
                "tokenizer": self._results.fingerprint(self._source.found, weights=False),
                "libraries": [version(name) for name in ("lm_eval", "tokenizers", "datasets")],
            }

            def answer(task: str = task) -> object:
                return run_task(
                    task,
                    lazy,
                    self._tokenizer,
                    batch_size=self._batch_size,
                    progress=progress,
                    **self._options,
                ).model_dump()

            answers = Answers.model_validate(self._results.record(key, answer))
            for note in answers.notes:
                if not any(note in others.notes for _, others in self._found[task]):
                    print(note, file=sys.stderr)
            self._found[task].append((lazy.name, answers))

    def report(self) -> list[TaskReport]:
        """Put everything together: a record for each task, metric and filter."""
        reports = []
        for models in self._found.values():
            source = models[0][1].outcomes
            scores = [
                (name, score_outcomes(name, answers.outcomes, None if number == 0 else source))
                for number, (name, answers) in enumerate(models)
            ]
            # A metric may have a value for some models only.
            rows = {outcome.row: outcome for _, answers in reversed(models) for outcome in answers.outcomes}
            order = dict.fromkeys(outcome.row for _, answers in models for outcome in answers.outcomes)
            for row in order:
                outcomes = [outcome for _, answers in models for outcome in answers.outcomes if outcome.row == row]
                reports.append(
                    TaskReport(
                        task=rows[row].task,
                        metric=rows[row].metric,
                        filter=rows[row].filter,
                        num_items=rows[row].num_items,
                        higher_is_better=rows[row].higher_is_better,
                        is_share=all(outcome.is_share for outcome in outcomes),
                        scores=tuple(
                            found.get(row) or TaskScore(model=name, value=None, standard_error=None)
                            for name, found in scores
                        ),
                    )
                )
        return reports

    def _identity(self, task: str, progress: Progress) -> str:
        if task not in self._identities:
            with progress.task(f"Reading {Path(task).name}", 1) as advance, open_task(task) as opened:
                self._identities[task] = opened.identity(num_fewshot=self._options["num_fewshot"])
                advance(1)
        return self._identities[task]


def _tasks_table(tasks: Sequence[TaskReport], names: Sequence[str]) -> TextTable:
    rows: list[tuple[str, ...]] = []
    for task in tasks:
        head = (task.label, f"{task.num_items:,}")
        for name, score in zip(names, task.scores, strict=True):
            value = with_error(score.value, score.standard_error, share=task.is_share)
            rows.append((*head, name, value, *_difference(score, task)))
            head = ("", "")
    title = f"Tasks, and paired differences to the source; from p {SIGNIFICANT} on they may be noise"
    return TextTable(title, ("Task", "Items", "Model", "Score", "Difference", "p", "is"), tuple(rows))


def _difference(score: TaskScore, task: TaskReport) -> tuple[str, ...]:
    if score.difference is None:
        return ("-", "-", "")
    difference = with_error(score.difference, score.difference_se, share=task.is_share, sign="+")
    if score.p_value is None:
        return (difference, "-", "")
    ways = ("other", "other") if task.higher_is_better is None else ("better", "worse")
    rises = (score.difference > 0) == (task.higher_is_better is not False)
    verdict = "noise" if score.p_value >= SIGNIFICANT else ways[not rises]
    return (difference, f"{score.p_value:.2g}", verdict)


def _tasks_plot(tasks: Sequence[TaskReport], names: Sequence[str]) -> str:
    # Shares have one axis; a perplexity has one of its own, or nothing else would be seen.
    shares = [task for task in tasks if task.is_share]
    panels = [*([shares] if shares else []), *([task] for task in tasks if not task.is_share)]
    figure = new_figure(8.0, 0.4 * len(panels) + 0.4 + 0.22 * len(tasks) * len(names))
    heights = [1 + len(panel) * len(names) for panel in panels]
    for axes, panel in zip(
        figure.subplots(len(panels), 1, squeeze=False, height_ratios=heights)[:, 0], panels, strict=True
    ):
        _differences(axes, panel, names)
    figure.axes[0].legend(fontsize=8)
    return as_svg(figure)


def _differences(axes: Any, tasks: Sequence[TaskReport], names: Sequence[str]) -> None:
    for number, name in enumerate(names[1:], start=1):
        places = [row + (number - len(names) / 2) / (len(names) + 1) for row in range(len(tasks))]
        scores = [task.scores[number] for task in tasks]
        axes.errorbar(
            [numpy.nan if score.difference is None else score.difference for score in scores],
            places,
            xerr=[1.96 * (score.difference_se or 0.0) for score in scores],
            fmt="o",
            color=f"C{number}",
            label=name,
        )
    axes.axvline(0, color="black", linewidth=0.8)
    axes.set_yticks(range(len(tasks)), labels=[task.label for task in tasks])
    axes.set_ylim(len(tasks) - 0.5, -0.5)
    if tasks[0].is_share:
        axes.xaxis.set_major_formatter("{x:+.1%}")
    axes.grid(alpha=0.3, axis="x")
