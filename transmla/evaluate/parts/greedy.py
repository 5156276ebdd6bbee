"""Greedy divergence: for how many tokens does a converted model write what its source writes?

The source writes; each converted model reads that, and where its own likeliest token is another one for the first time,
it would have gone its own way. That is one pass over the text, and exactly what writing would have shown.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from statistics import median

import numpy
import torch
from jaxtyping import Int
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel

from transmla.config import EvalRequest
from transmla.data.tokens import check_known
from transmla.evaluate.lazy_model import LazyModel
from transmla.evaluate.parts.base import Part, Setting
from transmla.evaluate.report.text_table import Shown, TextTable, percent
from transmla.evaluate.result_cache import Arrays, ResultCache
from transmla.evaluate.token_scores import score_tokens
from transmla.evaluate.windows import ScoredWindows
from transmla.progress import Progress
from transmla.records import Record

PROMPT_TOKENS = 64
"""Tokens of the windows after which the source writes."""


class GreedyScore(Record):
    """For how many tokens a model would have written what the source wrote, for each prompt.

    ``agreement`` is the share of all tokens that would have been the same after the source's own text.
    """

    model: str
    same_tokens: tuple[int, ...]
    median_same_tokens: float
    never_different: float
    agreement: float


class GreedyReport(Record):
    """What converted models would have written, compared with what the source wrote; its own entry is ``None``."""

    dataset: str
    num_prompts: int
    num_prompt_tokens: int
    num_new_tokens: int
    scores: tuple[GreedyScore | None, ...]


class GreedyPart(Part):
    """What all models would write after the starts of a text's windows."""

    name = "greedy"
    record = GreedyReport
    flags = ("--greedy-prompts",)
    on_first_text = True

    @classmethod
    def wanted(cls, request: EvalRequest) -> bool:
        """Return whether there are prompts."""
        return bool(request.greedy_prompts)

    @classmethod
    def longest(cls, request: EvalRequest) -> tuple[int, str]:
        """Return a prompt with what is written."""
        return min(PROMPT_TOKENS, request.window) + request.greedy_tokens, "--greedy-tokens"

    @classmethod
    def build(cls, setting: Setting) -> Iterator[Part]:
        """Yield one part, on the first text."""
        request, (dataset, windows) = setting.request, setting.first_text
        prompts = windows.starts(request.greedy_prompts, num_tokens=min(PROMPT_TOKENS, request.window))
        yield cls(
            dataset,
            prompts,
            results=setting.cache,
            source=setting.source,
            num_new_tokens=request.greedy_tokens,
            batch_size=request.batch_size,
        )

    @classmethod
    def tables(cls, records: Sequence[GreedyReport], shown: Shown) -> Iterator[TextTable]:
        """Yield how long conversions write what their source writes."""
        for greedy in records:
            yield _table(greedy, shown.names)

    def __init__(
        self,
        dataset: str,
        prompts: Int[Tensor, "prompts tokens"],
        *,
        results: ResultCache,
        source: LazyModel,
        num_new_tokens: int,
        batch_size: int,
    ) -> None:
        """Take prompts.

        Args:
            dataset: where they come from.
            prompts: all of one length.
            results: where what is known lies.
            source: that writes.
            num_new_tokens: how much it writes.
            batch_size: prompts at once.
        """
        self._dataset, self._prompts, self._num_new_tokens = dataset, prompts, num_new_tokens
        self._results, self._source, self._batch_size = results, source, batch_size
        self._found: list[tuple[str, Arrays | None]] = []

    def measure(self, lazy: LazyModel, progress: Progress) -> None:
        """Have the source write, or another model read what it wrote."""
        written = self._written(progress)
        if lazy is self._source:
            self._found.append((lazy.name, None))
            return
        windows = ScoredWindows(tuple(written), (self._prompts.shape[1],) * len(written), tokens_per_byte=1.0)

        def read() -> Arrays:
            # A source may say what the rows of a padded vocabulary stand for, which is nothing.
            check_known(written, vocab_size=lazy.model.config.vocab_size)
            with progress.task(f"{lazy.name} follows", len(written)) as advance:
                return score_tokens(lazy.model, windows, batch_size=self._batch_size, advance=advance)

        key = {"what": "text", **lazy.key, **windows.settings}
        self._found.append((lazy.name, self._results.arrays(key, read)))

    def report(self) -> Iterator[GreedyReport]:
        """Put everything together."""
        num_prompts = len(self._prompts)
        yield GreedyReport(
            dataset=self._dataset,
            num_prompts=num_prompts,
            num_prompt_tokens=self._prompts.shape[1],
            num_new_tokens=self._num_new_tokens,
            scores=tuple(
                None if scores is None else _score(name, scores["right"].reshape(num_prompts, -1))
                for name, scores in self._found
            ),
        )

    def _written(self, progress: Progress) -> Int[Tensor, "prompts tokens"]:
        key = {"what": "greedy", **self._source.key, "prompts": self._prompts.tolist(), "new": self._num_new_tokens}

        def write() -> Arrays:
            parts = []
            with progress.task(f"{self._source.name} writes", len(self._prompts)) as advance:
                for batch in self._prompts.split(self._batch_size):
                    parts.append(write_greedily(self._source.model, batch, num_new_tokens=self._num_new_tokens))
                    advance(len(batch))
            return {"tokens": torch.cat(parts).numpy()}

        return torch.from_numpy(self._results.arrays(key, write)["tokens"])


@torch.inference_mode()
def write_greedily(
    model: PreTrainedModel, prompts: Int[Tensor, "prompts tokens"], *, num_new_tokens: int, ends: Sequence[int] = ()
) -> Int[Tensor, "prompts longer"]:
    """Append the likeliest token, again and again.

    Args:
        model: that writes.
        prompts: all of one length.
        num_new_tokens: how much it writes.
        ends: tokens after which a text ends, and others are filled with 0; any other token, and by default every one
            that would end a text, is a token like the others.
    """
    plain = GenerationConfig(
        max_new_tokens=num_new_tokens,
        do_sample=False,
        eos_token_id=list(ends) or None,
        bos_token_id=None,
        pad_token_id=0,
    )
    prompts = prompts.to(model.device)
    everywhere = torch.ones_like(prompts)
    own, model.generation_config = model.generation_config, plain
    try:
        return model.generate(prompts, attention_mask=everywhere, generation_config=plain).cpu()
    finally:
        model.generation_config = own


def _score(name: str, right: numpy.ndarray) -> GreedyScore:
    lengths = [int(row.argmin()) if not row.all() else len(row) for row in right]
    return GreedyScore(
        model=name,
        same_tokens=tuple(lengths),
        median_same_tokens=float(median(lengths)),
        never_different=float(numpy.mean(right.all(1))),
        agreement=float(right.mean()),
    )


def _table(greedy: GreedyReport, names: Sequence[str]) -> TextTable:
    return TextTable(
        f"Greedy text after {greedy.num_prompts} prompts of {greedy.num_prompt_tokens} tokens, "
        f"{greedy.num_new_tokens} each",
        ("Model", "As the source for (median)", "to the end", "Same token after its text"),
        tuple(
            (
                name,
                f"{score.median_same_tokens:g} tokens",
                percent(score.never_different),
                percent(score.agreement),
            )
            for name, score in zip(names[1:], greedy.scores[1:], strict=True)
            if score is not None
        ),
    )
