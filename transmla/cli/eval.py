"""``transmla eval``: how good the converted models are, beside their source."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from transmla.cli.progress import choose_progress, warn
from transmla.config import EvalRequest

_help = EvalRequest.describe


def evaluate_models(
    source: Annotated[str | None, typer.Argument(help=_help("source"))] = None,
    converted: Annotated[list[str] | None, typer.Argument(help=_help("converted"))] = None,
    dataset: Annotated[list[str] | None, typer.Option(help=_help("dataset"))] = None,
    text_column: Annotated[str | None, typer.Option(help=_help("text_column"))] = None,
    bos: Annotated[str | None, typer.Option(help=_help("bos"))] = None,
    window: Annotated[int | None, typer.Option(help=_help("window"))] = None,
    stride: Annotated[int | None, typer.Option(help=_help("stride"))] = None,
    per_document: Annotated[bool | None, typer.Option("--per-document", help=_help("per_document"))] = None,
    max_tokens: Annotated[int | None, typer.Option(help=_help("max_tokens"))] = None,
    tasks: Annotated[list[str] | None, typer.Option(help=_help("tasks"))] = None,
    num_fewshot: Annotated[int | None, typer.Option(help=_help("num_fewshot"))] = None,
    limit: Annotated[int | None, typer.Option(help=_help("limit"))] = None,
    contexts: Annotated[list[str] | None, typer.Option(help=_help("contexts"))] = None,
    num_depths: Annotated[int | None, typer.Option(help=_help("num_depths"))] = None,
    num_trials: Annotated[int | None, typer.Option(help=_help("num_trials"))] = None,
    greedy_prompts: Annotated[int | None, typer.Option(help=_help("greedy_prompts"))] = None,
    greedy_tokens: Annotated[int | None, typer.Option(help=_help("greedy_tokens"))] = None,
    per_layer: Annotated[bool | None, typer.Option("--per-layer", help=_help("per_layer"))] = None,
    layer_windows: Annotated[int | None, typer.Option(help=_help("layer_windows"))] = None,
    bench_contexts: Annotated[list[str] | None, typer.Option(help=_help("bench_contexts"))] = None,
    batch_size: Annotated[int | None, typer.Option(help=_help("batch_size"))] = None,
    dtype: Annotated[str | None, typer.Option(help=_help("dtype"))] = None,
    device: Annotated[str | None, typer.Option(help=_help("device"))] = None,
    gguf_file: Annotated[str | None, typer.Option(help=_help("gguf_file"))] = None,
    revision: Annotated[str | None, typer.Option(help=_help("revision"))] = None,
    token: Annotated[str | None, typer.Option(help=_help("token"))] = None,
    no_cache: Annotated[bool | None, typer.Option("--no-cache", help=_help("no_cache"))] = None,
    config: Annotated[Path | None, typer.Option(help="YAML recipe; flags win over it.")] = None,
    report: Annotated[
        Path | None, typer.Option(help="Write tables and plots into this HTML file, which needs nothing else.")
    ] = None,
    update_card: Annotated[
        bool, typer.Option("--update-card", help="Write the numbers into the model cards of the converted folders.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the report as JSON.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Show no progress.")] = False,
) -> None:
    """Say how good converted models are, beside their source."""
    request = EvalRequest.build(recipe=config, flags=locals())

    # Only now: PyTorch and Transformers take seconds to import, and --help must not wait for them.
    from transmla.cli.eval_view import report_tables
    from transmla.cli.plots import check_plots, check_writable
    from transmla.evaluate.report.html import write_html
    from transmla.evaluate.report.model_card import check_cards, update_cards
    from transmla.evaluate.run import evaluate

    if report is not None:
        check_plots("--report")
        check_writable(report, "--report")
    if update_card:
        check_cards(request.converted)
    found = evaluate(request, progress=choose_progress(quiet=quiet), tell=warn)
    if report is not None:
        write_html(found, report)
    if update_card:
        update_cards(found)
    if as_json:
        print(found.model_dump_json(indent=2))
    else:
        Console().print(*report_tables(found), sep="\n")
