"""What a task's values are worth: their standard errors, and those of the differences to the source.

A mean over items has the standard error of a mean. What is computed of all items at once, such as F1, a correlation, a
perplexity or BLEU, is no mean: its standard error is that of the same number over items drawn again with replacement
(Efron's bootstrap). All models are given the same draws, so that the difference of two replicates is a paired one. The
number of a group is a weighted mean over tasks, whose items have nothing to do with each other.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import numpy

from transmla.evaluate.tasks.report import TaskScore
from transmla.records import Record

NUM_REPLICATES = 500
NUM_TEXT_REPLICATES = 100
"""Of metrics that compare texts and take seconds; a standard error is then right to a fourteenth."""


class Outcome(Record):
    """One metric of one model on one task, or group of tasks.

    Attributes:
        task: its name.
        metric: its name.
        filter: what the answers went through first; ``none`` where nothing.
        value: what lm-eval reports.
        num_items: that have a value.
        higher_is_better: which way is up, where lm-eval knows.
        is_share: whether it lies between 0 and 1 by its nature.
        answered: hash of which items have a value.
        items: the items' own values, where ``value`` is the mean of them.
        replicates: ``value`` over items that were drawn again, where it is no mean.
        parts: of a group: positions of its tasks' outcomes beside this one, and their weights.
    """

    task: str
    metric: str
    filter: str
    value: float
    num_items: int
    higher_is_better: bool | None = None
    is_share: bool = False
    answered: str = ""
    items: tuple[float, ...] | None = None
    replicates: tuple[float, ...] | None = None
    parts: tuple[tuple[int, float], ...] | None = None

    @property
    def row(self) -> tuple[str, str, str]:
        """Return what it is the value of."""
        return self.task, self.metric, self.filter


def replicate(metric: Callable[[Sequence[Any]], float], items: Sequence[Any]) -> tuple[float, ...] | None:
    """Compute a metric over draws of its items, the same ones for all models; ``None`` where one of them has no value.

    Args:
        metric: of all items at once.
        items: that it is computed of.
    """
    if len(items) < 2:
        return None
    chance = numpy.random.default_rng(0)
    found = []
    with warnings.catch_warnings():
        # A draw may well lack a class; scikit-learn says so of each.
        warnings.simplefilter("ignore")
        for _ in range(NUM_TEXT_REPLICATES if _holds_text(items[0]) else NUM_REPLICATES):
            drawn = chance.integers(len(items), size=len(items))
            try:
                found.append(float(metric([items[number] for number in drawn])))
            except Exception:  # Whatever it is that it cannot be computed of.
                return None
    return tuple(found) if numpy.isfinite(found).all() else None


def _holds_text(item: Any) -> bool:
    return isinstance(item, str) or (isinstance(item, tuple | list) and any(map(_holds_text, item)))


def score_outcomes(
    name: str, outcomes: Sequence[Outcome], source: Sequence[Outcome] | None
) -> dict[tuple[str, str, str], TaskScore]:
    """Return all scores of a model, by task, metric and filter.

    Args:
        name: of the model.
        outcomes: of the model.
        source: outcomes of the source, on the same tasks.
    """
    beside = {outcome.row: outcome for outcome in source or ()}
    scores: list[TaskScore] = []
    for outcome in outcomes:
        other = beside.get(outcome.row)
        if outcome.parts is not None:
            scores.append(_group_score(name, outcome, other, scores))
        elif outcome.items is not None and other is not None and _comparable(outcome, other):
            scores.append(task_score(name, outcome.items, other.items))
        else:
            scores.append(_plain_score(name, outcome, other))
    return {outcome.row: score for outcome, score in zip(outcomes, scores, strict=True)}


def task_score(name: str, values: Sequence[float], source: Sequence[float] | None) -> TaskScore:
    """Return a model's mean over items, and its difference to the source's on the same items.

    The items are what is random: a difference that comes from few of them, or is evened out by others, has a standard
    error as large as itself, however many items both models agree about.
    """
    items = numpy.asarray(values, dtype=numpy.float64)
    score: dict[str, Any] = {"model": name, "value": float(items.mean()), "standard_error": _standard_error(items)}
    if source is not None:
        difference = items - numpy.asarray(source, dtype=numpy.float64)
        score |= _compared(float(difference.mean()), _standard_error(difference))
    return TaskScore(**score)


def _plain_score(name: str, outcome: Outcome, other: Outcome | None) -> TaskScore:
    """Return the score of what is no mean, or is not compared item by item."""
    means = outcome.items is not None
    error = _standard_error(numpy.asarray(outcome.items)) if means else _spread(outcome.replicates)
    score: dict[str, Any] = {"model": name, "value": outcome.value, "standard_error": error}
    if other is not None:
        paired = None
        if outcome.replicates and other.replicates and _comparable(outcome, other):
            paired = _spread(numpy.subtract(outcome.replicates, other.replicates))
        score |= _compared(outcome.value - other.value, paired)
    return TaskScore(**score)


def _group_score(name: str, group: Outcome, other: Outcome | None, scores: Sequence[TaskScore]) -> TaskScore:
    assert group.parts is not None
    members = [(scores[number], weight) for number, weight in group.parts]

    def together(errors: Sequence[float | None]) -> float | None:
        if not errors or any(error is None for error in errors):
            return None
        return math.sqrt(
            sum((weight * (error or 0.0)) ** 2 for (_, weight), error in zip(members, errors, strict=True))
        )

    score: dict[str, Any] = {"model": name, "value": group.value}
    score["standard_error"] = together([member.standard_error for member, _ in members])
    if other is not None:
        paired = together([member.difference_se for member, _ in members]) if other.parts == group.parts else None
        score |= _compared(group.value - other.value, paired)
    return TaskScore(**score)


def _comparable(outcome: Outcome, other: Outcome) -> bool:
    """Return whether the same items have a value: a task may give none to an answer that it cannot read."""
    return (outcome.num_items, outcome.answered) == (other.num_items, other.answered)


def _compared(difference: float, error: float | None) -> dict[str, float | None]:
    if not math.isfinite(difference):
        return {}
    return {"difference": difference, "difference_se": error, "p_value": _p_value(difference, error)}


def _standard_error(values: numpy.ndarray) -> float | None:
    return float(values.std(ddof=1) / math.sqrt(len(values))) if len(values) > 1 else None


def _spread(replicates: Sequence[float] | numpy.ndarray | None) -> float | None:
    return None if replicates is None else float(numpy.std(replicates, ddof=1))


def _p_value(difference: float, error: float | None) -> float | None:
    """Return how likely a difference this large is, in either direction, where there is none (normal distribution)."""
    if error is None:
        return None
    if error == 0:
        return 1.0 if difference == 0 else 0.0
    return math.erfc(abs(difference) / error / math.sqrt(2))
