"""What all reports are made of."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict

Form = Literal["expanded", "absorbed"]
"""How latent attention runs: expanded, as stock transformers has it, or absorbed, on the cached latent itself."""


class Record(BaseModel):
    """Frozen, and nothing in it that nobody declared."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class Versions(Record):
    """The libraries that computed the numbers."""

    transmla: str
    torch: str
    transformers: str
