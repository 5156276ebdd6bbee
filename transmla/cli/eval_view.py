"""An evaluation as tables that fit 80 columns."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from rich import box
from rich.table import Table

from transmla.evaluate.report import EvalReport, TextReport, TextScore


def report_tables(report: EvalReport) -> Iterator[Table]:
    """Yield a table for each part of the report."""
    names = short_names([model.name for model in report.models])
    for text in report.texts:
        yield _text(text, names, report.dtype)
        if len(text.scores[0].positions) > 1:
            yield _positions(text, names)
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
