"""What comes out of a task: a value for every metric of every filter, and of every group.

A metric that fails on the items at hand, or that is no number, takes no other with it.
"""

from __future__ import annotations

import hashlib
import math
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import numpy

from transmla.evaluate.tasks.open_task import OpenTask, reason_of
from transmla.evaluate.tasks.scores import Outcome, replicate


def guard(opened: OpenTask) -> None:
    """Have a metric that cannot be computed be not a number, where lm-eval would drop everything."""
    for task in opened.tasks.values():
        task.aggregation = partial(_Guarded, task.aggregation)


def all_outcomes(opened: OpenTask, found: Mapping[str, Any], notes: list[str]) -> tuple[Outcome, ...]:
    """Return what a guarded task came to.

    Args:
        opened: the task.
        found: what lm-eval says about it.
        notes: takes what is left out, and why.
    """
    outcomes = tuple(_task_outcomes(opened, found, notes))
    return (*outcomes, *_group_outcomes(opened, found, outcomes, notes))


def _task_outcomes(opened: OpenTask, found: Mapping[str, Any], notes: list[str]) -> Iterator[Outcome]:
    for name, task in opened.tasks.items():
        samples = sorted(found["samples"].get(name, ()), key=lambda sample: sample["doc_id"])
        if not samples:
            notes.append(f"The task {name} is left out: it has no documents.")
        for chosen in dict.fromkeys(sample["filter"] for sample in samples):
            filtered = [sample for sample in samples if sample["filter"] == chosen]
            for metric in dict.fromkeys(metric for sample in filtered for metric in sample["metrics"]):
                answered = [sample for sample in filtered if metric in sample["metrics"]]
                try:
                    yield _outcome(name, metric, chosen, task, answered, found)
                except _NoValueError as reason:
                    notes.append(f"The metric {metric} of the task {name} is left out: {reason}.")
        for metric in task.aggregation().names - {metric for sample in samples for metric in sample["metrics"]}:
            notes.append(f"The metric {metric} of the task {name} is left out: no document has it.")


def _outcome(
    name: str, metric: str, chosen: str, task: Any, answered: Sequence[dict[str, Any]], found: Mapping[str, Any]
) -> Outcome:
    from lm_eval.api import metrics
    from lm_eval.api.registry import AGGREGATION_REGISTRY

    items = [sample[metric] for sample in answered]
    aggregate = task.aggregation().original(metric)
    value = _value(aggregate, items)
    numbers = tuple(float(item) for item in items) if all(map(_is_number, items)) else None
    shares = numbers is not None and all(0 <= number <= 1 for number in numbers if not math.isnan(number))
    is_mean = aggregate is metrics.mean and numbers is not None
    # Of what others have written nobody knows whether its items may be drawn one by one.
    may_be_drawn = not is_mean and aggregate in AGGREGATION_REGISTRY.values()
    return Outcome(
        task=name,
        metric=metric,
        filter=chosen,
        value=value,
        num_items=len(items),
        higher_is_better=_direction(found, name, metric),
        is_share=aggregate is metrics.f1_score or (shares and aggregate in (metrics.mean, metrics.nanmean)),
        answered=hashlib.sha256(repr([sample["doc_id"] for sample in answered]).encode()).hexdigest()[:16],
        items=numbers if is_mean else None,
        replicates=replicate(aggregate, items) if may_be_drawn else None,
    )


def _group_outcomes(
    opened: OpenTask, found: Mapping[str, Any], outcomes: Sequence[Outcome], notes: list[str]
) -> Iterator[Outcome]:
    """Yield what groups aggregate of their tasks: always a mean, weighted by the items of each or not at all."""
    places = {outcome.row: number for number, outcome in enumerate(outcomes)}
    for name, group in opened.groups.items():
        names = [task.task_name for task in group.get_all_tasks()]
        for wanted in group.aggregate_metric_list or ():
            filters = wanted.filter_list or sorted({o.filter for o in outcomes if o.metric == wanted.metric})
            for chosen in filters or ["none"]:
                members = [places[row] for task in names if (row := (task, wanted.metric, chosen)) in places]
                value = found["results"][name].get(f"{wanted.metric},{chosen}")
                what = f"The metric {wanted.metric} of the group {name}"
                if callable(wanted.aggregation):
                    notes.append(f"{what} is left out: lm-eval takes the mean, and not the function that it names.")
                elif not members:
                    notes.append(f"{what} is left out: none of its tasks has a value of it.")
                elif not _is_number(value) or not math.isfinite(value):
                    notes.append(f"{what} is left out: not all of its tasks have a number.")
                else:
                    if len(members) < len(names):
                        notes.append(f"{what} is that of {len(members)} of its {len(names)} tasks.")
                    sizes = [found["results"][outcomes[number].task]["sample_len"] for number in members]
                    weights = sizes if wanted.weight_by_size else [1] * len(members)
                    yield Outcome(
                        task=name,
                        metric=wanted.metric,
                        filter=chosen,
                        value=float(value),
                        num_items=sum(outcomes[number].num_items for number in members),
                        higher_is_better=_direction(found, name, wanted.metric),
                        is_share=all(outcomes[number].is_share for number in members),
                        parts=tuple(
                            (number, weight / sum(weights)) for number, weight in zip(members, weights, strict=True)
                        ),
                    )


class _NoValueError(Exception):
    """A metric has no value; why."""


class _Guarded:
    """The aggregations of a task, where one that fails takes no other with it."""

    def __init__(self, aggregation: Callable[[], Mapping[str, Any]]) -> None:
        self._aggregation = aggregation

    @property
    def names(self) -> set[str]:
        """Return the metrics that the task names."""
        return set(self._aggregation())

    def original(self, metric: str) -> Callable[[Sequence[Any]], Any]:
        """Return what lm-eval takes for a metric: a mean, where the task names nothing."""
        from lm_eval.api.metrics import mean

        return self._aggregation().get(metric, mean)

    def __getitem__(self, metric: str) -> Callable[[Sequence[Any]], float]:
        def value(items: Sequence[Any]) -> float:
            try:
                return _value(self.original(metric), items)
            except _NoValueError:
                return math.nan

        return value


def _value(aggregate: Callable[[Sequence[Any]], Any], items: Sequence[Any]) -> float:
    """Return the number that a metric is.

    Raises:
        _NoValueError: it is none.
    """
    if all(item is None for item in items):
        raise _NoValueError("none of its items has a value")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            value = aggregate(items)
        except OverflowError:
            # The exponential of a loss: a perplexity of a text that is one word, as Chinese is to lm-eval.
            return math.inf
        except Exception as error:
            raise _NoValueError(f"lm-eval cannot compute it, {reason_of(error)}") from None
    if not _is_number(value):
        raise _NoValueError(f"it is of the type {type(value).__name__}, and not a number")
    if math.isnan(value):
        raise _NoValueError("it is not a number (nan)")
    return float(value)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float | numpy.number | numpy.bool_)


def _direction(found: Mapping[str, Any], task: str, metric: str) -> bool | None:
    # lm-eval 0.4.12 has errors in translation go up with quality.
    if metric == "ter":
        return False
    known = found["higher_is_better"].get(task, {}).get(metric)
    return known if isinstance(known, bool) else None
