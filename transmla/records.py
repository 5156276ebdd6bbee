"""What all reports are made of."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, model_validator

from transmla.old_names import renamed

FORMAT_VERSION = 2
"""Of the reports that are written. 1 is that of 0.1.0, which wrote no version: its names are in
:mod:`transmla.old_names`."""

Form = Literal["expanded", "absorbed"]
"""How latent attention runs: expanded, as stock transformers has it, or absorbed, on the cached latent itself."""


class Record(BaseModel):
    """Frozen, and nothing in it that nobody declared."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    @model_validator(mode="before")
    @classmethod
    def _read(cls, values: Any) -> Any:
        """Take what was written under old names, and leave out what follows from the other fields."""
        values = renamed(cls.__name__, values)
        if isinstance(values, dict):
            return {name: value for name, value in values.items() if name not in cls.model_computed_fields}
        return values


class Versions(Record):
    """The libraries that computed the numbers."""

    transmla: str
    torch: str
    transformers: str
