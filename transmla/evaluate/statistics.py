"""What the scores of all tokens of a text come to."""

from __future__ import annotations

import math
from itertools import pairwise

import numpy

from transmla.evaluate.result_cache import Arrays
from transmla.evaluate.windows import ScoredWindows
from transmla.records import Record

FIRST_BUCKET = 256
"""Losses are put together by the tokens before a judged one: 0 to 255, 256 to 511, and from there in octaves."""


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
            stop=stop,
            num_positions=int(chosen.sum()),
            nll=_mean(scores["nll"][chosen]),
            excess_nll=None if difference is None else _mean(difference[chosen]),
            kl=None if source is None else _mean(scores["kl"][chosen]),
        )
        for start, stop in pairwise(_edges(windows.longest))
        if (chosen := (before >= start) & (before < stop)).any()
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


def _edges(longest: int) -> list[int]:
    edges = [0, FIRST_BUCKET]
    while edges[-1] < longest:
        edges.append(2 * edges[-1])
    return edges


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
