"""What a benchmark found, as data that reads and writes JSON."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import median

from transmla.records import Form, Record, Versions


class BenchModel(Record):
    """One model in one form, and the bytes of its weights."""

    name: str
    architecture: str
    form: Form
    num_parameters: int
    weight_bytes: int


class BenchCell(Record):
    """One model in one form at one context length and batch size.

    Medians are over the rounds. Speedups are medians too, of each round's own ratio: the source's seconds over this
    model's, just before or after. ``peak`` bytes count the weights, the cache and all else that lives at the same time.
    Where memory was too little the numbers are absent and ``problem`` says so.
    """

    model: str
    form: Form
    context: int
    batch_size: int
    problem: str | None = None
    first_token_rounds: tuple[float, ...] = ()
    decode_rounds: tuple[float, ...] = ()
    seconds_to_first_token: float | None = None
    decode_tokens_per_second: float | None = None
    first_token_speedup: float | None = None
    decode_speedup: float | None = None
    cache_bytes: int | None = None
    peak_bytes_first_token: int | None = None
    peak_bytes_decode: int | None = None


class BenchReport(Record):
    """All cells, the source's first at each context length and batch size, and how they were measured."""

    models: tuple[BenchModel, ...]
    cells: tuple[BenchCell, ...]
    num_new_tokens: int
    num_rounds: int
    seed: int
    dtype: str
    device: str
    machine: str
    num_threads: int
    versions: Versions


def paired_speedup(source: Sequence[float], other: Sequence[float]) -> float:
    """Return the median, over the rounds, of the source's seconds over the other's."""
    return median(theirs / ours for theirs, ours in zip(source, other, strict=True))
