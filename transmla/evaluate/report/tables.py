"""An evaluation as sheets of short words, which the terminal, a page and a card lay out alike."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import groupby
from pathlib import Path
from statistics import fmean

from transmla.bench.report import BenchReport
from transmla.evaluate.report.report import EvalReport, GreedyReport, TaskReport, TaskScore, TextReport, TextScore

SIGNIFICANT = 0.05
"""Probability below which a difference is not taken for noise."""


@dataclass(frozen=True)
class TextTable:
    """A table: the first column holds names, the others mostly numbers."""

    title: str
    headings: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]


def report_tables_of(report: EvalReport) -> Iterator[TextTable]:
    """Yield a sheet for each part of the report.

    By position, the source's column is its loss, and the others are what they have more.
    """
    names = short_names([model.name for model in report.models])
    for text in report.texts:
        yield _text(text, names, report.dtype)
        if len(text.scores[0].positions) > 1:
            yield _positions(text, names)
    if report.tasks:
        yield _tasks(report, names)
    if report.contexts:
        yield _contexts(report, names)
    for greedy in report.greedy:
        yield _greedy(greedy, names)
    if report.layers:
        yield _layers(report, names)
    yield _cost(report, names)
    for bench in report.speed:
        yield _speed(bench, dict(zip((model.name for model in report.models), names, strict=True)))


def short_names(names: Sequence[str]) -> list[str]:
    """Return as much of the ends of paths as tells them apart."""
    for count in range(1, 1 + max(len(Path(name).parts) for name in names)):
        short = ["/".join(Path(name).parts[-count:]) for name in names]
        if len(set(short)) == len(set(names)):
            break
    return short


def _text(text: TextReport, names: Sequence[str], dtype: str) -> TextTable:
    data = text.data
    return TextTable(
        f"{Path(data.dataset).name}: {data.num_positions:,} tokens in {data.protocol}, {dtype}",
        ("Model", "Perplexity", "Bits/byte", "Excess NLL", "KL", "Top-1", "Top-5"),
        tuple(
            (
                name,
                f"{score.perplexity:.4f}",
                f"{score.bits_per_byte:.4f}",
                _excess(score),
                _small(score.kl),
                _percent(score.top1_agreement),
                _percent(score.top5_agreement),
            )
            for name, score in zip(names, text.scores, strict=True)
        ),
    )


def _positions(text: TextReport, names: Sequence[str]) -> TextTable:
    rows = []
    for number, bucket in enumerate(text.scores[0].positions):
        others = (score.positions[number].excess_nll for score in text.scores[1:])
        label = f"{bucket.start:,} to {bucket.stop - 1:,}"
        rows.append((label, f"{bucket.nll:.4f}", *(_small(excess, "+") for excess in others)))
    title = f"{Path(text.data.dataset).name}: excess NLL by position"
    return TextTable(title, ("Tokens before", *names), tuple(rows))


def _tasks(report: EvalReport, names: Sequence[str]) -> TextTable:
    rows: list[tuple[str, ...]] = []
    for task in report.tasks:
        head = (task.label, f"{task.num_items:,}")
        for name, score in zip(names, task.scores, strict=True):
            value = _with_error(score.value, score.standard_error, share=task.is_share)
            rows.append((*head, name, value, *_difference(score, task)))
            head = ("", "")
    title = f"Tasks, and paired differences to the source; from p {SIGNIFICANT} on they may be noise"
    return TextTable(title, ("Task", "Items", "Model", "Score", "Difference", "p", "is"), tuple(rows))


def _difference(score: TaskScore, task: TaskReport) -> tuple[str, ...]:
    if score.difference is None:
        return ("-", "-", "")
    difference = _with_error(score.difference, score.difference_se, share=task.is_share, sign="+")
    if score.p_value is None:
        return (difference, "-", "")
    ways = ("other", "other") if task.higher_is_better is None else ("better", "worse")
    rises = (score.difference > 0) == (task.higher_is_better is not False)
    verdict = "noise" if score.p_value >= SIGNIFICANT else ways[not rises]
    return (difference, f"{score.p_value:.2g}", verdict)


def _contexts(report: EvalReport, names: Sequence[str]) -> TextTable:
    rows = []
    cells = sorted(report.contexts, key=lambda cell: (cell.kind, cell.length))
    for (kind, length), group in groupby(cells, key=lambda cell: (cell.kind, cell.length)):
        columns = zip(*(cell.scores for cell in group), strict=True)
        shares = (fmean(score.token_accuracy for score in column) for column in columns)
        rows.append((kind, f"{length:,}", *map(_percent, shares)))
    return TextTable("Looking back: tokens said right", ("Task", "Tokens", *names), tuple(rows))


def _greedy(greedy: GreedyReport, names: Sequence[str]) -> TextTable:
    return TextTable(
        f"Greedy text behind {greedy.num_prompts} prompts of {greedy.num_prompt_tokens} tokens, "
        f"{greedy.num_new_tokens} each",
        ("Model", "As the source for (median)", "to the end", "Same token behind its text"),
        tuple(
            (
                name,
                f"{score.median_same_tokens:g} tokens",
                _percent(score.never_different),
                _percent(score.agreement),
            )
            for name, score in zip(names[1:], greedy.scores, strict=True)
        ),
    )


def _layers(report: EvalReport, names: Sequence[str]) -> TextTable:
    rows = []
    for layers in zip(*(model.layers for model in report.layers), strict=True):
        cells = (f"{layer.relative_error:.1%}  {layer.excess_nll:+.4f}" for layer in layers)
        rows.append((str(layers[0].layer), *cells))
    sums = (sum(layer.excess_nll for layer in model.layers) for model in report.layers)
    rows.append(("sum", *(_small(total, "+") for total in sums)))
    title = "One layer at a time: off by, loss rises by"
    return TextTable(title, ("Layer", *names[1:]), tuple(rows))


def _cost(report: EvalReport, names: Sequence[str]) -> TextTable:
    whole = report.models[0].kv_bytes_per_token
    return TextTable(
        "Cost; the cache is measured, and computed from the config",
        ("Model", "KV bytes/token", "computed", "of the source", "Parameters"),
        tuple(
            (
                name,
                f"{model.kv_bytes_per_token:,}",
                f"{model.kv_bytes_computed:,}",
                f"{model.kv_bytes_per_token / whole:.1%}",
                _short(model.num_parameters),
            )
            for name, model in zip(names, report.models, strict=True)
        ),
    )


def _speed(bench: BenchReport, names: Mapping[str, str]) -> TextTable:
    rows = []
    for cell in bench.cells:
        name = names[cell.model] + (", absorbed" if cell.form == "absorbed" else "")
        numbers = (cell.seconds_to_first_token, cell.decode_tokens_per_second, cell.decode_speedup)
        rows.append((name, f"{cell.context:,}", *("-" if number is None else f"{number:.3g}" for number in numbers)))
    return TextTable(
        f"Speed, {bench.dtype}, {bench.machine}, {bench.num_threads} threads",
        ("Model", "Context", "First token, s", "Decoded tokens/s", "of the source's"),
        tuple(rows),
    )


def _excess(score: TextScore) -> str:
    error = "" if score.excess_se is None else f" ±{_small(score.excess_se)}"
    return _small(score.excess_nll, "+") + error


def _with_error(value: float | None, error: float | None, *, share: bool, sign: str = "") -> str:
    if value is None:
        return "-"
    write = f"{{:{sign}.1%}}".format if share else partial(_number, sign=sign)
    return write(value) + ("" if error is None else f" ±{error:.1%}" if share else f" ±{_number(error)}")


def _number(value: float, sign: str = "") -> str:
    return format(value, f"{sign}.4f" if value == 0 or 1e-3 <= abs(value) < 1e4 else f"{sign}.4g")


def _small(value: float | None, sign: str = "") -> str:
    if value is None:
        return "-"
    return format(value, f"{sign}.4f" if value == 0 or abs(value) >= 1e-3 else f"{sign}.0e")


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{value:.1%}"


def _short(count: int) -> str:
    for unit, size in (("B", 10**9), ("M", 10**6), ("k", 10**3)):
        if count >= size:
            return f"{count / size:.2f}{unit}"
    return str(count)
