"""An evaluation as pictures, each a piece of SVG that stands in a page."""

from __future__ import annotations

import io
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy

from transmla.evaluate.report.report import ContextReport, EvalReport, TaskReport, TextReport
from transmla.evaluate.report.tables import short_names


def report_plots(report: EvalReport) -> Iterator[tuple[str, str]]:
    """Yield a title and an SVG for each part of the report that says more as a picture."""
    names = short_names([model.name for model in report.models])
    if report.texts and len(names) > 1:
        yield "Quality against cache", _quality(report, names)
    for text in report.texts:
        if len(text.scores[0].positions) > 1 and len(names) > 1:
            yield f"{Path(text.data.dataset).name}: loss by position", _positions(text, names)
    if report.tasks and len(names) > 1:
        yield "Tasks: differences to the source, with 95 % intervals", _tasks(report.tasks, names)
    needles = [cell for cell in report.contexts if cell.kind == "needle"]
    if needles:
        yield "Needles: tokens said right", _needles(needles, names)
    copies = [cell for cell in report.contexts if cell.kind == "copy"]
    if len(copies) > 1:
        yield "Copies: tokens said right", _copies(copies, names)
    if report.layers:
        yield "One converted layer at a time", _layers(report, names)


def _figure(width: float, height: float) -> Any:
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


def _svg(figure: Any) -> str:
    import matplotlib

    written = io.StringIO()
    # Text stays text, and the same numbers make the same bytes.
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "transmla"}):
        figure.savefig(written, format="svg", metadata={"Date": None})
    return written.getvalue()[written.getvalue().index("<svg") :]


def _quality(report: EvalReport, names: Sequence[str]) -> str:
    figure = _figure(1.0 + 4 * len(report.texts), 3.6)
    whole = report.models[0].kv_bytes_per_token
    for axes, text in zip(figure.subplots(1, len(report.texts), squeeze=False)[0], report.texts, strict=True):
        for number, (name, model, score) in enumerate(zip(names, report.models, text.scores, strict=True)):
            place = (model.kv_bytes_per_token / whole, score.perplexity)
            axes.plot(*place, marker="o", linestyle="", color=f"C{number}", label=name)
        axes.set_xlabel("KV cache, share of the source's")
        axes.set_ylabel(f"perplexity, {Path(text.data.dataset).name}")
        axes.xaxis.set_major_formatter("{x:.0%}")
        axes.grid(alpha=0.3)
    figure.legend(*figure.axes[0].get_legend_handles_labels(), loc="outside right upper", fontsize=8)
    return _svg(figure)


def _positions(text: TextReport, names: Sequence[str]) -> str:
    figure = _figure(8.0, 3.0)
    axes = figure.subplots()
    for number, (name, score) in enumerate(zip(names[1:], text.scores[1:], strict=True), start=1):
        middles = [(bucket.start + bucket.stop) / 2 for bucket in score.positions]
        axes.plot(
            middles, [bucket.excess_nll for bucket in score.positions], marker="o", color=f"C{number}", label=name
        )
    axes.set_xlabel("tokens before")
    axes.set_ylabel("excess NLL, nats")
    axes.set_ylim(bottom=min(0.0, axes.get_ylim()[0]))
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    return _svg(figure)


def _tasks(tasks: Sequence[TaskReport], names: Sequence[str]) -> str:
    # Shares have one axis; a perplexity has one of its own, or nothing else would be seen.
    shares = [task for task in tasks if task.is_share]
    panels = [*([shares] if shares else []), *([task] for task in tasks if not task.is_share)]
    figure = _figure(8.0, 0.4 * len(panels) + 0.4 + 0.22 * len(tasks) * len(names))
    heights = [1 + len(panel) * len(names) for panel in panels]
    for axes, panel in zip(
        figure.subplots(len(panels), 1, squeeze=False, height_ratios=heights)[:, 0], panels, strict=True
    ):
        _differences(axes, panel, names)
    figure.axes[0].legend(fontsize=8)
    return _svg(figure)


def _differences(axes: Any, tasks: Sequence[TaskReport], names: Sequence[str]) -> None:
    for number, name in enumerate(names[1:], start=1):
        places = [row + (number - len(names) / 2) / (len(names) + 1) for row in range(len(tasks))]
        scores = [task.scores[number] for task in tasks]
        axes.errorbar(
            [numpy.nan if score.difference is None else score.difference for score in scores],
            places,
            xerr=[1.96 * (score.difference_se or 0.0) for score in scores],
            fmt="o",
            color=f"C{number}",
            label=name,
        )
    axes.axvline(0, color="black", linewidth=0.8)
    axes.set_yticks(range(len(tasks)), labels=[task.label for task in tasks])
    axes.set_ylim(len(tasks) - 0.5, -0.5)
    if tasks[0].is_share:
        axes.xaxis.set_major_formatter("{x:+.1%}")
    axes.grid(alpha=0.3, axis="x")


def _needles(cells: Sequence[ContextReport], names: Sequence[str]) -> str:
    lengths, depths = (sorted({getattr(cell, key) for cell in cells}) for key in ("length", "depth"))
    figure = _figure(1.2 + 0.5 * len(names) * (len(lengths) + 1), 1.4 + 0.35 * len(depths))
    panels = figure.subplots(1, len(names), squeeze=False, sharey=True)[0]
    for number, (axes, name) in enumerate(zip(panels, names, strict=True)):
        shares = numpy.zeros((len(depths), len(lengths)))
        for cell in cells:
            shares[depths.index(cell.depth), lengths.index(cell.length)] = cell.scores[number].token_accuracy
        image = axes.imshow(shares, vmin=0, vmax=1, cmap="RdYlGn", aspect="auto")
        for row, column in numpy.ndindex(*shares.shape):
            axes.text(column, row, f"{shares[row, column]:.0%}", ha="center", va="center", fontsize=6)
        axes.set_xticks(range(len(lengths)), labels=[f"{length:,}" for length in lengths], rotation=90, fontsize=7)
        axes.set_title(name, fontsize=8)
    panels[0].set_yticks(range(len(depths)), labels=[f"{depth:.0%}" for depth in depths], fontsize=7)
    panels[0].set_ylabel("depth")
    figure.colorbar(image, ax=list(panels))
    return _svg(figure)


def _copies(cells: Sequence[ContextReport], names: Sequence[str]) -> str:
    figure = _figure(8.0, 3.0)
    axes = figure.subplots()
    lengths = [cell.length for cell in cells]
    for number, name in enumerate(names):
        shares = [cell.scores[number].token_accuracy for cell in cells]
        axes.plot(lengths, shares, marker="o", color=f"C{number}", label=name)
    axes.set_xscale("log", base=2)
    axes.set_xticks(lengths, labels=[f"{length:,}" for length in lengths])
    axes.set_xlabel("tokens")
    axes.yaxis.set_major_formatter("{x:.0%}")
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    return _svg(figure)


def _layers(report: EvalReport, names: Sequence[str]) -> str:
    figure = _figure(9.0, 3.0)
    for axes, field, label in zip(
        figure.subplots(1, 2), ("relative_error", "excess_nll"), ("output off by", "loss rises by, nats"), strict=True
    ):
        for number, (name, model) in enumerate(zip(names[1:], report.layers, strict=True), start=1):
            axes.plot([getattr(layer, field) for layer in model.layers], marker=".", color=f"C{number}", label=name)
        axes.set_xlabel("layer")
        axes.set_ylabel(label)
        axes.grid(alpha=0.3)
    figure.axes[0].legend(fontsize=8)
    return _svg(figure)
