"""``transmla eval``: how good the converted models are, beside their source."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich import box
from rich.console import Console
from rich.table import Table

from transmla.cli.progress import choose_progress
from transmla.config import EvalRequest
from transmla.evaluate.report import EvalReport, ModelReport

_help = EvalRequest.describe


def evaluate_models(
    source: Annotated[str | None, typer.Argument(help=_help("source"))] = None,
    converted: Annotated[list[str] | None, typer.Argument(help=_help("converted"))] = None,
    dataset: Annotated[str | None, typer.Option(help=_help("dataset"))] = None,
    text_column: Annotated[str | None, typer.Option(help=_help("text_column"))] = None,
    window: Annotated[int | None, typer.Option(help=_help("window"))] = None,
    max_tokens: Annotated[int | None, typer.Option(help=_help("max_tokens"))] = None,
    batch_size: Annotated[int | None, typer.Option(help=_help("batch_size"))] = None,
    dtype: Annotated[str | None, typer.Option(help=_help("dtype"))] = None,
    device: Annotated[str | None, typer.Option(help=_help("device"))] = None,
    gguf_file: Annotated[str | None, typer.Option(help=_help("gguf_file"))] = None,
    revision: Annotated[str | None, typer.Option(help=_help("revision"))] = None,
    token: Annotated[str | None, typer.Option(help=_help("token"))] = None,
    config: Annotated[Path | None, typer.Option(help="YAML recipe; flags win over it.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the report as JSON.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Show no progress.")] = False,
) -> None:
    """Measure perplexity, agreement with the source, and KV cache, of a source and its conversions."""
    request = EvalRequest.build(recipe=config, flags=locals())

    # Only now: PyTorch and Transformers take seconds to import, and --help must not wait for them.
    from transmla.evaluate.run import evaluate

    report = evaluate(request, progress=choose_progress(quiet=quiet))
    if as_json:
        print(report.model_dump_json(indent=2))
    else:
        Console().print(report_table(report))


def report_table(report: EvalReport) -> Table:
    """Lay the report out for people, within 80 columns."""
    data = report.data
    table = Table(
        title=f"{Path(data.dataset).name}: {data.num_windows} windows of {data.window} tokens, {report.dtype}",
        box=box.SIMPLE_HEAD,
        title_justify="left",
        pad_edge=False,
    )
    table.add_column("Model", overflow="fold", min_width=16)
    for heading in ("Perplexity", "Excess\nNLL", "KL", "Top-1", "KV bytes\n/token", "Para-\nmeters"):
        table.add_column(heading, justify="right", no_wrap=True)
    for model in (report.source, *report.converted):
        table.add_row(*_row(model))
    return table


def _row(model: ModelReport) -> list[str]:
    return [
        Path(model.name).name,
        f"{model.perplexity:.4f}",
        _small(model.excess_nll, "+"),
        _small(model.kl),
        "-" if model.top1_agreement is None else f"{model.top1_agreement:.2%}",
        f"{model.kv_bytes_per_token:,}",
        _short(model.num_parameters),
    ]


def _small(value: float | None, sign: str = "") -> str:
    if value is None:
        return "-"
    return format(value, f"{sign}.4f" if value == 0 or abs(value) >= 1e-3 else f"{sign}.0e")


def _short(count: int) -> str:
    for unit, size in (("B", 10**9), ("M", 10**6), ("k", 10**3)):
        if count >= size:
            return f"{count / size:.2f}{unit}"
    return str(count)
