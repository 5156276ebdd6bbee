"""Greedy divergence: for how many tokens does a converted model write what its source writes?

The source writes; each converted model reads that, and where its own likeliest token is another one for the first time,
it would have gone its own way. That is one pass over the text, and exactly what writing would have shown.
"""

from __future__ import annotations

from collections.abc import Iterator
from statistics import median

import numpy
import torch
from jaxtyping import Int
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel

from transmla.data.tokens import check_known
from transmla.evaluate.lazy_model import LazyModel
from transmla.evaluate.report.report import GreedyReport, GreedyScore
from transmla.evaluate.result_cache import Arrays, ResultCache
from transmla.evaluate.token_scores import score_tokens
from transmla.evaluate.windows import ScoredWindows
from transmla.progress import Progress


class GreedyPart:
    """What all models would write behind the starts of a text's windows."""

    field = "greedy"

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
        self._found: list[tuple[str, Arrays]] = []

    def measure(self, lazy: LazyModel, progress: Progress) -> None:
        """Have the source write, or another model read what it wrote."""
        written = self._written(progress)
        if lazy is self._source:
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
            scores=tuple(_score(name, scores["right"].reshape(num_prompts, -1)) for name, scores in self._found),
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
    model: PreTrainedModel, prompts: Int[Tensor, "prompts tokens"], *, num_new_tokens: int
) -> Int[Tensor, "prompts longer"]:
    """Append the likeliest token, again and again; one that would end the text is a token like the others."""
    plain = GenerationConfig(
        max_new_tokens=num_new_tokens, do_sample=False, eos_token_id=None, bos_token_id=None, pad_token_id=0
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
