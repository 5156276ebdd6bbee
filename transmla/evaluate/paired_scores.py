"""What models say of the judged tokens of a text, each compared with the source, which reads the text once.

The source leaves its hidden states, so that it reads however many models it is compared with, now or later.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager

from transmla.data.vocabulary import SharedTokens
from transmla.evaluate.lazy_model import LazyModel
from transmla.evaluate.result_cache import Arrays, HiddenStateFile, ResultCache
from transmla.evaluate.token_scores import Reference, score_tokens
from transmla.evaluate.windows import ScoredWindows
from transmla.modeling.lm_head import model_head
from transmla.modeling.load import read_config
from transmla.progress import Progress


class PairedScores:
    """The scores of one text, by :func:`~transmla.evaluate.token_scores.score_tokens`, from the cache or computed."""

    def __init__(
        self,
        windows: ScoredWindows,
        *,
        what: str,
        results: ResultCache,
        source: LazyModel,
        shared: Mapping[str, SharedTokens],
        batch_size: int,
    ) -> None:
        """Take a text.

        Args:
            windows: the text.
            what: a model does with it, for the progress: "reads wiki.txt".
            results: where what is known lies.
            source: that the others are compared with.
            shared: the tokens that each of the others, by its folder, shares with the source.
            batch_size: windows at once.
        """
        self._windows, self._what, self._results = windows, what, results
        self._source, self._shared, self._batch_size = source, shared, batch_size

    def of(self, lazy: LazyModel, progress: Progress) -> Arrays:
        """Return what a model says of every judged token; with the comparisons, but for the source."""
        read = self._read_source if lazy is self._source else self._read_beside
        return self._results.arrays(self._key(lazy), lambda: read(lazy, progress))

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
        return progress.task(f"{lazy.name} {self._what}", len(self._windows.tokens))

    @property
    def _states(self) -> HiddenStateFile:
        return HiddenStateFile(self._results.path(self._key(self._source), ".states"))

    @property
    def _shape(self) -> tuple[int, int]:
        return self._windows.num_positions, read_config(self._source.found).hidden_size

    def _key(self, lazy: LazyModel) -> dict[str, object]:
        key = {"what": "text", **lazy.key, **self._windows.settings}
        return key if lazy is self._source else key | {"source": self._source.fingerprint}
