"""An evaluation as tables that fit 80 columns."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import groupby
from pathlib import Path
from statistics import fmean

from rich import box
from rich.table import Table

from transmla.evaluate.report import EvalReport, GreedyReport, TaskScore, TextReport, TextScore

SIGNIFICANT = 0.05
"""Probability below which a difference is not taken for noise."""


def report_tables(report: EvalReport) -> Iterator[Table]:
    """Yield a table for each part of the report."""
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


def short_names(names: Sequence[str]) -> list[str]:
    """Return as much of the ends of paths as tells them apart."""
    for count in range(1, 1 + max(len(Path(name).parts) for name in names)):
        short = ["/".join(Path(name).parts[-count:]) for name in names]
        if len(set(short)) == len(set(names)):
            break
    return short


def measurement_table(title: str, first: str, *headings: str) -> Table:
    """Start a table of numbers, with a name in each row."""
    table = Table(title=title, box=box.SIMPLE_HEAD, title_justify="left", pad_edge=False)
    table.add_column(first, overflow="fold", min_width=12)
    for heading in headings:
        table.add_column(heading, justify="right", no_wrap=True)
    return table


def _text(text: TextReport, names: Sequence[str], dtype: str) -> Table:
    data = text.data
    table = measurement_table(
        f"{Path(data.dataset).name}: {data.num_positions:,} tokens in {data.protocol}, {dtype}",
        "Model",
        *("Perplexity", "Bits\n/byte", "Excess NLL", "KL", "Top-1", "Top-5"),
    )
    for name, score in zip(names, text.scores, strict=True):
        table.add_row(
            name,
            f"{score.perplexity:.4f}",
            f"{score.bits_per_byte:.4f}",
            _excess(score),
            small(score.kl),
            percent(score.top1_agreement),
            percent(score.top5_agreement),
        )
    return table


def _positions(text: TextReport, names: Sequence[str]) -> Table:
    table = measurement_table("Excess NLL (source: NLL) by tokens before", "Tokens before", *names)
    for number, bucket in enumerate(text.scores[0].positions):
        others = (score.positions[number].excess_nll for score in text.scores[1:])
        table.add_row(
            f"{bucket.start:,} to {bucket.stop - 1:,}", f"{bucket.nll:.4f}", *(small(excess, "+") for excess in others)
        )
    return table


def _tasks(report: EvalReport, names: Sequence[str]) -> Table:
    table = measurement_table(
        "Tasks; a difference is noise where models as good as each other would differ as much one time in 20, or more",
        "Task",
        *("Items", "Model", "Score", "Difference", "p", ""),
    )
    for task in report.tasks:
        head = [f"{task.task}, {task.metric}", f"{task.num_items:,}"]
        for name, score in zip(names, task.scores, strict=True):
            table.add_row(*head, name, _with_error(score.value, score.standard_error), *_difference(score))
            head = ["", ""]
        table.add_section()
    return table


def _with_error(value: float, error: float | None, sign: str = "") -> str:
    return f"{value:{sign}.2%}" + ("" if error is None else f" ±{error:.2%}")


def _difference(score: TaskScore) -> list[str]:
    if score.difference is None:
        return ["-", "-", ""]
    if score.p_value is None:
        return [_with_error(score.difference, None, "+"), "-", ""]
    verdict = "noise" if score.p_value >= SIGNIFICANT else "better" if score.difference > 0 else "worse"
    return [_with_error(score.difference, score.difference_se, "+"), f"{score.p_value:.2g}", verdict]


def _contexts(report: EvalReport, names: Sequence[str]) -> Table:
    table = measurement_table("Looking back: tokens said right, needles at all depths", "Task", "Tokens", *names)
    groups = groupby(
        sorted(report.contexts, key=lambda cell: (cell.kind, cell.length)), key=lambda cell: (cell.kind, cell.length)
    )
    for (kind, length), group in groups:
        columns = zip(*(cell.scores for cell in group), strict=True)
        table.add_row(
            kind, f"{length:,}", *(f"{fmean(score.token_accuracy for score in column):.1%}" for column in columns)
        )
    return table


def _greedy(greedy: GreedyReport, names: Sequence[str]) -> Table:
    table = measurement_table(
        f"Greedy text behind {greedy.num_prompts} prompts of {greedy.num_prompt_tokens} tokens from "
        f"{Path(greedy.dataset).name}, {greedy.num_new_tokens} tokens each",
        "Model",
        *("Same as the source for\n(median tokens)", "Never\ndifferent", "Same token behind\nthe source's text"),
    )
    for name, score in zip(names[1:], greedy.scores, strict=True):
        table.add_row(name, f"{score.median_same_tokens:g}", f"{score.never_different:.1%}", f"{score.agreement:.1%}")
    return table


def _layers(report: EvalReport, names: Sequence[str]) -> Table:
    """Lay out the layers, one a row; of each model the error and the share of the loss."""
    table = measurement_table(
        "One converted layer at a time: attention output off by, loss rises by", "Layer", *names[1:]
    )
    for rows in zip(*(model.layers for model in report.layers), strict=True):
        cells = [f"{row.relative_error:.1%}  {small(row.excess_nll, '+')}" for row in rows]
        table.add_row(str(rows[0].layer), *cells)
    sums = (sum(layer.excess_nll for layer in model.layers) for model in report.layers)
    table.add_section()
    table.add_row("sum", *(small(total, "+") for total in sums))
    return table


def _cost(report: EvalReport, names: Sequence[str]) -> Table:
    table = measurement_table(
        "Cost",
        "Model",
        *("KV bytes\n/token", "of the\nsource", "KV numbers\n/token, layer", "Parameters"),
    )
    whole = report.models[0].kv_bytes_per_token
    for name, model in zip(names, report.models, strict=True):
        table.add_row(
            name,
            f"{model.kv_bytes_per_token:,}",
            f"{model.kv_bytes_per_token / whole:.1%}",
            f"{model.kv_numbers_per_token_layer:,.0f}",
            _short(model.num_parameters),
        )
    return table


def _excess(score: TextScore) -> str:
    error = "" if score.excess_se is None else f" ±{small(score.excess_se)}"
    return small(score.excess_nll, "+") + error


def small(value: float | None, sign: str = "") -> str:
    """Write a number that may be tiny, or absent."""
    if value is None:
        return "-"
    return format(value, f"{sign}.4f" if value == 0 or abs(value) >= 1e-3 else f"{sign}.0e")


def percent(value: float | None) -> str:
    """Write a share, which may be absent."""
    return "-" if value is None else f"{value:.2%}"


def _short(count: int) -> str:
    for unit, size in (("B", 10**9), ("M", 10**6), ("k", 10**3)):
        if count >= size:
            return f"{count / size:.2f}{unit}"
    return str(count)
