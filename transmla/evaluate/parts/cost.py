"""What a model costs: parameters, and the cache that a token leaves."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from transmla.config import EvalRequest
from transmla.evaluate.lazy_model import LazyModel
from transmla.evaluate.parts.base import Part, Setting
from transmla.evaluate.report.text_table import Shown, TextTable, counted
from transmla.evaluate.result_cache import ResultCache
from transmla.modeling.kv_cache import computed_cache_numbers, measure_cache
from transmla.progress import Progress
from transmla.records import Record


class ModelReport(Record):
    """One model, and what it costs.

    ``kv_bytes_computed`` is what the config says, the other two are measured on a cache.
    """

    name: str
    fingerprint: str
    kv_bytes_per_token: int
    kv_numbers_per_token_layer: float
    kv_bytes_computed: int
    num_parameters: int


class CostPart(Part):
    """The cost of all models."""

    name = "models"
    record = ModelReport
    flags = ()

    @classmethod
    def wanted(cls, request: EvalRequest) -> bool:
        """Return that it costs next to nothing."""
        return True

    @classmethod
    def build(cls, setting: Setting) -> Iterator[Part]:
        """Yield one part for all models."""
        yield cls(results=setting.cache)

    @classmethod
    def only(cls, record: Any, number: int, full_names: Sequence[str]) -> Record | None:
        """Return the record of either model."""
        return record if record.name in (full_names[0], full_names[number]) else None

    @classmethod
    def tables(cls, records: Sequence[ModelReport], shown: Shown) -> Iterator[TextTable]:
        """Yield the cost of all models."""
        whole = records[0].kv_bytes_per_token
        yield TextTable(
            "Cost; the cache is measured, and computed from the config",
            ("Model", "KV bytes/token", "computed", "of the source", "Parameters"),
            tuple(
                (
                    name,
                    f"{model.kv_bytes_per_token:,}",
                    f"{model.kv_bytes_computed:,}",
                    f"{model.kv_bytes_per_token / whole:.1%}",
                    counted(model.num_parameters),
                )
                for name, model in zip(shown.names, records, strict=True)
            ),
        )

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
