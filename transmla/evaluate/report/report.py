"""What an evaluation found, as data that reads and writes JSON: a field for each part of the registry."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from pydantic import ConfigDict, model_validator

from transmla.evaluate.parts import PARTS
from transmla.evaluate.parts.cost import ModelReport
from transmla.evaluate.report.text_table import Shown, short_names
from transmla.records import FORMAT_VERSION, Record, Versions


class EvalReport(Record):
    """The models, the source first, what was measured, and how; what a part found is the field of its name."""

    model_config = ConfigDict(frozen=True, extra="allow")

    format_version: int = FORMAT_VERSION
    models: tuple[ModelReport, ...]
    dtype: str
    device: str
    versions: Versions

    if TYPE_CHECKING:

        def __getattr__(self, name: str) -> Any:
            """Return what a part found."""

    @model_validator(mode="before")
    @classmethod
    def _read_parts(cls, values: Any) -> Any:
        if not isinstance(values, dict):
            return values
        if "format_version" not in values:
            values = _from_first_format(values)
        unknown = [name for name in values if name not in PARTS and name not in cls.model_fields]
        if unknown:
            raise ValueError(f"no part of an evaluation is called {unknown[0]}")
        found = {name: _records(part.record, values.get(name, ())) for name, part in PARTS.items()}
        return {**values, **found}

    def shown(self) -> Shown:
        """Return what tables and plots of all models have in common."""
        full = tuple(model.name for model in self.models)
        sizes = tuple(model.kv_bytes_per_token for model in self.models)
        return Shown(tuple(short_names(full)), full, self.dtype, sizes)


def _records(kind: type[Record], values: Any) -> tuple[Record, ...]:
    return tuple(value if isinstance(value, kind) else kind.model_validate(value) for value in values)


def _from_first_format(values: dict[str, Any]) -> dict[str, Any]:
    """Give the source an entry in what compares others with it."""
    count = len(values.get("models", ()))

    def completed(record: Any) -> Any:
        if not isinstance(record, dict) or len(record["scores"]) == count:
            return record
        return {**record, "scores": [None, *record["scores"]]}

    values = {**values, "greedy": [completed(record) for record in values.get("greedy", ())]}
    layers = list(values.get("layers", ()))
    if layers and isinstance(layers[0], dict) and "layers" in layers[0]:
        models = [{"model": record["model"], "layers": record["layers"]} for record in layers]
        about = {name: layers[0][name] for name in ("dataset", "num_positions")}
        values["layers"] = [{**about, "scores": [None, *models]}]
    return values
