"""Language modelling: how well models predict a text, and how far the converted ones are from their source."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from transmla.config import EvalRequest
from transmla.data.tokens import text_start
from transmla.data.vocabulary import SharedTokens
from transmla.evaluate.lazy_model import LazyModel
from transmla.evaluate.paired_scores import PairedScores
from transmla.evaluate.parts.base import Part, Setting
from transmla.evaluate.report.svg import as_svg, new_figure
from transmla.evaluate.report.text_table import Shown, TextTable, percent, small
from transmla.evaluate.result_cache import Arrays, ResultCache
from transmla.evaluate.statistics import Bucket, TextScore, text_score
from transmla.evaluate.windows import ScoredWindows
from transmla.progress import Progress
from transmla.records import Record


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


class TextReport(Record):
    """One text, and what each model makes of it: the source first."""

    data: DataReport
    scores: tuple[TextScore, ...]


class PerplexityPart(Part):
    """One text, judged by all models."""

    name = "texts"
    record = TextReport
    flags = ("--dataset",)

    @classmethod
    def wanted(cls, request: EvalRequest) -> bool:
        """Return whether there is a text."""
        return bool(request.dataset)

    @classmethod
    def longest(cls, request: EvalRequest) -> tuple[int, str]:
        """Return the window."""
        return request.window, "--window"

    @classmethod
    def build(cls, setting: Setting) -> Iterator[Part]:
        """Yield a part for each text."""
        for dataset, windows in setting.texts.items():
            yield cls(
                dataset,
                protocol(setting.request, windows, setting.tokenizer),
                windows,
                results=setting.cache,
                source=setting.source,
                batch_size=setting.request.batch_size,
                shared=setting.shared,
            )

    @classmethod
    def tables(cls, records: Sequence[TextReport], shown: Shown) -> Iterator[TextTable]:
        """Yield perplexities and comparisons, and the loss by position: the source's, and what others have more."""
        for text in records:
            yield _text_table(text, shown)
            if len(text.scores[0].positions) > 1:
                yield _positions_table(text, shown.names)

    @classmethod
    def plots(cls, records: Sequence[TextReport], shown: Shown) -> Iterator[tuple[str, str]]:
        """Yield perplexity against cache, and the excess by position."""
        if not records or len(shown.names) < 2:
            return
        yield "Quality against cache", _quality_plot(records, shown)
        for text in records:
            if len(text.scores[0].positions) > 1:
                yield f"{Path(text.data.dataset).name}: excess NLL by position", _positions_plot(text, shown.names)

    def __init__(
        self,
        dataset: str,
        protocol: str,
        windows: ScoredWindows,
        *,
        results: ResultCache,
        source: LazyModel,
        batch_size: int,
        shared: Mapping[str, SharedTokens],
    ) -> None:
        """Take a text.

        Args:
            dataset: what the user calls it.
            protocol: how it is joined, cut and judged, in words.
            windows: the text itself.
            results: where what is known lies.
            source: that the others are compared with.
            batch_size: windows at once.
            shared: the tokens that each of the others, by its folder, shares with the source.
        """
        self._dataset, self._protocol, self._windows = dataset, protocol, windows
        self._scores = PairedScores(
            windows,
            what=f"reads {Path(dataset).name}",
            results=results,
            source=source,
            shared=shared,
            batch_size=batch_size,
        )
        self._found: list[tuple[str, Arrays]] = []

    def measure(self, lazy: LazyModel, progress: Progress) -> None:
        """Have a model read the text: the source first, then others beside it."""
        self._found.append((lazy.name, self._scores.of(lazy, progress)))

    def report(self) -> list[TextReport]:
        """Put everything together."""
        windows, source = self._windows, self._found[0][1]
        return [
            TextReport(
                data=DataReport(
                    dataset=self._dataset,
                    protocol=self._protocol,
                    num_tokens=windows.num_tokens,
                    num_windows=len(windows.tokens),
                    num_positions=windows.num_positions,
                    num_tokens_dropped=windows.num_dropped,
                    **self._rows,
                    sha256=windows.sha256,
                ),
                scores=tuple(
                    text_score(name, windows, scores, None if scores is source else source)
                    for name, scores in self._found
                ),
            )
        ]

    @property
    def _rows(self) -> dict[str, Any]:
        rows = asdict(self._windows.reading)
        # Nothing is learnt here.
        del rows["dataset"], rows["num_without_answer"]
        return rows


def protocol(request: EvalRequest, windows: ScoredWindows, tokenizer: PreTrainedTokenizerBase) -> str:
    """Return how a text is joined, cut and judged, which is what perplexities differ by."""
    said = [f"{'each document by itself, up to' if request.per_document else 'windows of'} {request.window} tokens"]
    if request.stride is not None and request.stride < request.window:
        said.append(f"stride {request.stride}")
    if windows.chats:
        said.append("chats as their template lays them out")
    elif windows.reading.columns and not request.per_document:
        said.append("rows joined by an empty line")
    start = tokenizer.decode(text_start(tokenizer, request.bos)) if request.bos != "never" else ""
    where = "the text" if request.bos == "once" else "each"
    said.append(f"{start} in front of {where}" if start else "no BOS")
    said.append("all but the first judged" if not start or request.bos == "once" else f"all after {start} judged")
    return ", ".join(said)


def _text_table(text: TextReport, shown: Shown) -> TextTable:
    data = text.data
    return TextTable(
        f"{Path(data.dataset).name}: {data.num_positions:,} tokens in {data.protocol}, {shown.dtype}",
        ("Model", "Perplexity", "Bits/byte", "Excess NLL", "KL", "Top-1", "Top-5"),
        tuple(
            (
                name,
                f"{score.perplexity:.4f}",
                f"{score.bits_per_byte:.4f}",
                _excess(score),
                small(score.kl),
                percent(score.top1_agreement),
                percent(score.top5_agreement),
            )
            for name, score in zip(shown.names, text.scores, strict=True)
        ),
    )


def _positions_table(text: TextReport, names: Sequence[str]) -> TextTable:
    rows = []
    for number, bucket in enumerate(text.scores[0].positions):
        others = (score.positions[number].excess_nll for score in text.scores[1:])
        rows.append((_bucket_name(bucket), f"{bucket.nll:.4f}", *(small(excess, "+") for excess in others)))
    title = f"{Path(text.data.dataset).name}: excess NLL by position"
    return TextTable(title, ("Tokens before", *names), tuple(rows))


def _bucket_name(bucket: Bucket) -> str:
    return f"{bucket.start:,} to {bucket.stop - 1:,}"


def _excess(score: TextScore) -> str:
    error = "" if score.excess_se is None else f" ±{small(score.excess_se)}"
    return small(score.excess_nll, "+") + error


def _quality_plot(texts: Sequence[TextReport], shown: Shown) -> str:
    figure = new_figure(1.0 + 4 * len(texts), 3.6)
    whole = shown.kv_bytes_per_token[0]
    for axes, text in zip(figure.subplots(1, len(texts), squeeze=False)[0], texts, strict=True):
        for number, (name, size, score) in enumerate(
            zip(shown.names, shown.kv_bytes_per_token, text.scores, strict=True)
        ):
            place = (size / whole, score.perplexity)
            axes.plot(*place, marker="o", linestyle="", color=f"C{number}", label=name)
        axes.set_xlabel("KV cache, share of the source's")
        axes.set_ylabel(f"perplexity, {Path(text.data.dataset).name}")
        axes.xaxis.set_major_formatter("{x:.0%}")
        axes.grid(alpha=0.3)
    figure.legend(*figure.axes[0].get_legend_handles_labels(), loc="outside right upper", fontsize=8)
    return as_svg(figure)


def _positions_plot(text: TextReport, names: Sequence[str]) -> str:
    figure = new_figure(8.0, 3.0)
    axes = figure.subplots()
    buckets = [_bucket_name(bucket) for bucket in text.scores[0].positions]
    for number, (name, score) in enumerate(zip(names[1:], text.scores[1:], strict=True), start=1):
        excess = [bucket.excess_nll for bucket in score.positions]
        axes.plot(range(len(excess)), excess, marker="o", color=f"C{number}", label=name)
    axes.set_xticks(range(len(buckets)), labels=buckets)
    axes.set_xlabel("tokens before")
    axes.set_ylabel("excess NLL, nats")
    axes.set_ylim(bottom=min(0.0, axes.get_ylim()[0]))
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    return as_svg(figure)
