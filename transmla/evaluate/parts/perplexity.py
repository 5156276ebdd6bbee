"""Language modelling: how well models predict a text, and how far the converted ones are from their source."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy

from transmla.data.vocabulary import SharedTokens
from transmla.evaluate.lazy_model import LazyModel
from transmla.evaluate.report.report import Bucket, DataReport, TextReport, TextScore
from transmla.evaluate.result_cache import Arrays, HiddenStateFile, ResultCache
from transmla.evaluate.token_scores import Reference, score_tokens
from transmla.evaluate.windows import ScoredWindows
from transmla.modeling.lm_head import model_head
from transmla.modeling.load import read_config
from transmla.progress import Progress

BUCKET = 512
"""Tokens before a judged one, by which losses are put together."""


class PerplexityPart:
    """One text, judged by all models.

    The source leaves its hidden states, so that it reads the text once however many models it is compared with, now or
    later.
    """

    field = "texts"

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
        self._shared = shared
        self._dataset, self._protocol, self._windows = dataset, protocol, windows
        self._results, self._source, self._batch_size = results, source, batch_size
        self._found: list[tuple[str, Arrays]] = []

    def measure(self, lazy: LazyModel, progress: Progress) -> None:
        """Have a model read the text: the source first, then others beside it."""
        read = self._read_source if lazy is self._source else self._read_beside
        key = self._key(lazy)
        self._found.append((lazy.name, self._results.arrays(key, lambda: read(lazy, progress))))

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

    def _read_source(self, source: LazyModel, progress: Progress) -> Arrays:
        model = source.model
        with self._task(source, progress) as advance, self._states.filled(self._shape, model.dtype) as rows:
            return score_tokens(model, self._windows, batch_size=self._batch_size, keep=rows, advance=advance)

    def _read_beside(self, converted: LazyModel, progress: Progress) -> Arrays:
        if not self._states.complete:
            self._read_source(self._source, progress)
        source, model = self._source.model, converted.model
        shared = self._shared.get(str(converted.found.folder))
        reference = Reference(model_head(source), self._states.open(self._shape, source.dtype), shared)
        with self._task(converted, progress) as advance:
            return score_tokens(model, self._windows, batch_size=self._batch_size, reference=reference, advance=advance)

    def _task(self, lazy: LazyModel, progress: Progress) -> AbstractContextManager[Callable[[int], None]]:
        return progress.task(f"{lazy.name} reads {Path(self._dataset).name}", len(self._windows.tokens))

    @property
    def _states(self) -> HiddenStateFile:
        return HiddenStateFile(self._results.path(self._key(self._source), ".states"))

    @property
    def _shape(self) -> tuple[int, int]:
        return self._windows.num_positions, read_config(self._source.found).hidden_size

    def _key(self, lazy: LazyModel) -> dict[str, object]:
        key = {"what": "text", **lazy.key, **self._windows.settings}
        return key if lazy is self._source else key | {"source": self._source.fingerprint}


def text_score(name: str, windows: ScoredWindows, scores: Arrays, source: Arrays | None = None) -> TextScore:
    """Put the scores of all tokens together.

    Args:
        name: of the model.
        windows: the text.
        scores: of the model.
        source: scores of the source, which the model is compared with.
    """
    number, before = windows.places()
    nll = _mean(scores["nll"])
    difference = None if source is None else scores["nll"].astype(numpy.float64) - source["nll"]
    buckets = [
        Bucket(
            start=start,
            stop=start + BUCKET,
            num_positions=int(chosen.sum()),
            nll=_mean(scores["nll"][chosen]),
            excess_nll=None if difference is None else _mean(difference[chosen]),
            kl=None if source is None else _mean(scores["kl"][chosen]),
        )
        for start in range(0, windows.longest, BUCKET)
        if (chosen := (before >= start) & (before < start + BUCKET)).any()
    ]
    compared = {}
    if difference is not None:
        compared = {
            "excess_nll": _mean(difference),
            "excess_se": clustered_standard_error(difference, number),
            # A divergence is never negative, but the rounding of one that is zero may be.
            "kl": max(0.0, _mean(scores["kl"])),
            "top1_agreement": _mean(scores["top1"]),
            "top5_agreement": _mean(scores["top5"]),
        }
    return TextScore(
        model=name,
        nll=nll,
        perplexity=math.exp(nll) if nll < 709 else math.inf,
        bits_per_byte=nll * windows.tokens_per_byte / math.log(2),
        positions=tuple(buckets),
        **compared,
    )


def clustered_standard_error(values: numpy.ndarray, cluster: numpy.ndarray) -> float | None:
    """Return the standard error of the mean of values of which those of a cluster may go together.

    The tokens of a window do. ``None`` where there is one cluster only.
    """
    count = int(cluster[-1]) + 1
    if count < 2:
        return None
    deviations = numpy.bincount(cluster, values - values.mean(), minlength=count)
    return float(math.sqrt((deviations**2).sum() * count / (count - 1)) / len(values))


def _mean(values: numpy.ndarray) -> float:
    # The loss of an exact conversion differs from its source's in the seventh digit, which float32 would swallow.
    return float(values.mean(dtype=numpy.float64))
