"""What a model costs: parameters, and the cache that a token leaves."""

from __future__ import annotations

from typing import Any

from transmla.evaluate.lazy_model import LazyModel
from transmla.evaluate.report.report import ModelReport
from transmla.evaluate.result_cache import ResultCache
from transmla.modeling.kv_cache import computed_cache_numbers, measure_cache
from transmla.progress import Progress


class CostPart:
    """The cost of all models."""

    field = "models"

    def __init__(self, *, results: ResultCache) -> None:
        self._results = results
        self._found: list[ModelReport] = []

    def measure(self, lazy: LazyModel, progress: Progress) -> None:
        """Count a model's parameters and what it caches."""

        def count() -> dict[str, Any]:
            model = lazy.model
            use = measure_cache(model)
            return {
                "kv_bytes_per_token": use.bytes_per_token,
                "kv_numbers_per_token_layer": use.numbers_per_token_layer,
                "kv_bytes_computed": computed_cache_numbers(model.config) * model.dtype.itemsize,
                "num_parameters": sum(parameter.numel() for parameter in model.parameters()),
            }

        counted = self._results.record({"what": "cost", **lazy.key}, count)
        self._found.append(ModelReport(name=lazy.name, fingerprint=lazy.fingerprint, **counted))

    def report(self) -> list[ModelReport]:
        """Return what was counted."""
        return self._found
