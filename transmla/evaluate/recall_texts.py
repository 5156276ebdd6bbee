"""The texts in which models look back, as a request asks for them: kinds, lengths, depths and numbers."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy
import torch

from transmla.config import EvalRequest, ProbeKind
from transmla.data.documents import Documents, with_text
from transmla.data.probes import code_prompt, json_prompt, needles_prompt, passage_prompts
from transmla.data.synthetic import RecallPrompt, copy_prompt, needle_prompt, whole_words
from transmla.data.text import first_tokens
from transmla.errors import UsageError
from transmla.evaluate.windows import ScoredWindows

if TYPE_CHECKING:
    from transmla.evaluate.parts.base import Setting

_MADE: Mapping[ProbeKind, Callable[..., RecallPrompt]] = {
    "needles": needles_prompt,
    "json": json_prompt,
    "code": code_prompt,
}


class Cell(NamedTuple):
    """What some texts have in common; a depth is where a single needle lies."""

    kind: ProbeKind
    length: int
    depth: float | None = None


def are_chosen(request: EvalRequest) -> bool:
    """Return whether kinds are asked for by name."""
    return bool(request.probes != EvalRequest.model_fields["probes"].default)


def write_texts(setting: Setting) -> dict[Cell, list[RecallPrompt]]:
    """Write all texts that are asked for; what there is no room or no text for is left out and told.

    Raises:
        UsageError: that is so of a kind that is asked for by name, or of a needle or copy.
    """
    request = setting.request
    write = _writer(setting)
    texts = {}
    for cell in _cells(request):
        try:
            texts[cell] = write(cell)
        except UsageError as error:
            if are_chosen(request) or cell.kind in ("needle", "copy"):
                raise
            setting.tell(f"The kind {cell.kind} is left out at {cell.length:,} tokens. {error}")
    return texts


def as_windows(trials: Sequence[RecallPrompt]) -> tuple[ScoredWindows, numpy.ndarray]:
    """Return texts of one length, judged from one place on, and which of the judged tokens count, a row for each."""
    judged = max(trial.answer for trial in trials)
    counts = numpy.zeros((len(trials), judged), dtype=bool)
    for row, trial in zip(counts, trials, strict=True):
        row[judged - trial.answer :] = trial.counts or True
    tokens = torch.tensor([trial.tokens for trial in trials])
    first = tokens.shape[1] - judged
    return ScoredWindows(tuple(tokens), (first,) * len(trials), tokens_per_byte=1.0), counts


def _cells(request: EvalRequest) -> list[Cell]:
    depths = [number / max(1, request.needle_depths - 1) for number in range(request.needle_depths)]
    cells = []
    for length in sorted(set(request.needle_lengths)):
        for kind in dict.fromkeys(request.probes):
            if kind == "needle":
                cells += [Cell(kind, length, depth) for depth in depths]
            elif kind != "passage" or request.dataset:
                cells.append(Cell(kind, length))
    return cells


def _writer(setting: Setting) -> Callable[[Cell], list[RecallPrompt]]:
    """Return what writes the texts of a cell."""
    request, tokenizer, start = setting.request, setting.tokenizer, setting.start
    seeds = range(request.needle_trials)
    words = whole_words(tokenizer, vocab_size=setting.vocab_size) if "copy" in request.probes else []
    if "passage" in request.probes and request.dataset:
        documents = Documents(request.dataset[0], text_column=request.text_column, tokenizer=tokenizer)
        text = first_tokens(with_text(documents), tokenizer, len(seeds) * (max(request.needle_lengths) // 2))

    def write(cell: Cell) -> list[RecallPrompt]:
        length = cell.length
        if cell.kind == "passage":
            return passage_prompts(text, length=length, count=len(seeds), start=start)
        if cell.kind == "copy":
            return [copy_prompt(words, length=length, seed=seed, start=start) for seed in seeds]
        if cell.depth is not None:
            return [needle_prompt(tokenizer, length=length, depth=cell.depth, seed=seed, start=start) for seed in seeds]
        return [_MADE[cell.kind](tokenizer, length=length, seed=seed, start=start) for seed in seeds]

    return write
