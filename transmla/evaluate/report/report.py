"""What an evaluation found, as data that reads and writes JSON."""

from __future__ import annotations

from typing import Literal

from transmla.bench.report import BenchReport
from transmla.records import Record, Versions

Kind = Literal["needle", "copy"]
"""What a model looks back for."""


class ModelReport(Record):
    """One model, and what it costs.

    ``kv_bytes_computed`` is what the config says, the other two are measured on a cache.
    """

    name: str
    fingerprint: str
    kv_bytes_per_token: int
    kv_numbers_per_token_layer: float
    kv_bytes_computed: int
    num_parameters: int


class DataReport(Record):
    """A text: enough to know whether two reports speak of the same tokens.

    ``num_positions`` tokens are judged; ``num_tokens_dropped`` of the text are in no window, and ``num_without_text``
    rows hold nothing.
    """

    dataset: str
    protocol: str
    num_tokens: int
    num_windows: int
    num_positions: int
    num_tokens_dropped: int = 0
    columns: tuple[str, ...] = ()
    unread_columns: tuple[str, ...] = ()
    unread_by_template: tuple[str, ...] = ()
    is_found: bool = False
    num_rows: int = 0
    num_without_text: int = 0
    sha256: str


class Bucket(Record):
    """The judged tokens that have ``start`` to ``stop`` others before them in their window."""

    start: int
    stop: int
    num_positions: int
    nll: float
    excess_nll: float | None = None
    kl: float | None = None


class TextScore(Record):
    """How a model predicts a text; the comparisons are with the source, and ``None`` for the source itself.

    ``excess_se`` is the standard error of the excess over texts like this one, windows taken for independent.
    ``top5_agreement`` is the share of the source's five likeliest tokens that are among the model's.
    """

    model: str
    nll: float
    perplexity: float
    bits_per_byte: float
    excess_nll: float | None = None
    excess_se: float | None = None
    kl: float | None = None
    top1_agreement: float | None = None
    top5_agreement: float | None = None
    positions: tuple[Bucket, ...]


class TextReport(Record):
    """One text, and what each model makes of it: the source first."""

    data: DataReport
    scores: tuple[TextScore, ...]


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


class ContextScore(Record):
    """What a model says when it must look back: the share of tokens it gets right, and of texts without a mistake."""

    model: str
    token_accuracy: float
    exact: float
    nll: float


class ContextReport(Record):
    """Texts of one kind and length, with the needle at one depth: 0 at the start, 1 just before the question."""

    kind: Kind
    length: int
    depth: float | None
    num_trials: int
    scores: tuple[ContextScore, ...]


class GreedyScore(Record):
    """For how many tokens a model would have written what the source wrote, for each prompt.

    ``agreement`` is the share of all tokens that would have been the same behind the source's own text.
    """

    model: str
    same_tokens: tuple[int, ...]
    median_same_tokens: float
    never_different: float
    agreement: float


class GreedyReport(Record):
    """What converted models would have written, beside what the source wrote."""

    dataset: str
    num_prompts: int
    num_prompt_tokens: int
    num_new_tokens: int
    scores: tuple[GreedyScore, ...]


class LayerScore(Record):
    """One converted layer in the source: relative error of its attention's output, and what the loss rises by.

    ``share`` is its part of the sum over all layers; the layers together may cost more, or less, than that.
    """

    layer: int
    relative_error: float
    excess_nll: float
    share: float


class LayersReport(Record):
    """All layers of one converted model."""

    model: str
    dataset: str
    num_positions: int
    layers: tuple[LayerScore, ...]


class EvalReport(Record):
    """The models, the source first, what was measured, and how."""

    models: tuple[ModelReport, ...]
    texts: tuple[TextReport, ...] = ()
    tasks: tuple[TaskReport, ...] = ()
    contexts: tuple[ContextReport, ...] = ()
    greedy: tuple[GreedyReport, ...] = ()
    layers: tuple[LayersReport, ...] = ()
    speed: tuple[BenchReport, ...] = ()
    dtype: str
    device: str
    versions: Versions
