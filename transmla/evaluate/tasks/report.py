"""What tasks have shown, as data."""

from __future__ import annotations

from transmla.records import Record


class TaskScore(Record):
    """A model's value of a metric, and its difference to the source on the same items.

    ``p_value`` is how likely a difference as large is, in either direction, between models that are equally good. There
    is no ``value`` where the metric has none for this model, and no error where nobody knows how to get one.
    """

    model: str
    value: float | None
    standard_error: float | None
    difference: float | None = None
    difference_se: float | None = None
    p_value: float | None = None


class TaskReport(Record):
    """One metric of a task, or of a group of tasks, and what each model reaches: the source first.

    ``filter`` is what the answers went through first. ``higher_is_better`` is lm-eval's word, where it has one.
    ``is_share`` is whether the values are shares of one, such as an accuracy.
    """

    task: str
    metric: str
    filter: str = "none"
    num_items: int
    higher_is_better: bool | None = True
    is_share: bool = True
    scores: tuple[TaskScore, ...]

    @property
    def label(self) -> str:
        """Return what tables and pictures call it."""
        return f"{self.task} ({self.metric}{'' if self.filter == 'none' else f', {self.filter}'})"
