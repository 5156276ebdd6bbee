"""What an evaluation found, as data that reads and writes JSON."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict


class _Record(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class ModelReport(_Record):
    """One model; the comparisons are with the source, and ``None`` for the source itself."""

    name: str
    perplexity: float
    nll: float
    excess_nll: float | None = None
    kl: float | None = None
    top1_agreement: float | None = None
    kv_bytes_per_token: int
    kv_numbers_per_token_layer: float
    num_parameters: int


class DataReport(_Record):
    """The text: enough to know whether two reports speak of the same tokens."""

    dataset: str
    num_tokens: int
    num_windows: int
    window: int
    num_positions: int
    sha256: str


class Versions(_Record):
    """The libraries that computed the numbers."""

    transmla: str
    torch: str
    transformers: str


class EvalReport(_Record):
    """The source, the converted models in the order asked for, and how they were measured."""

    source: ModelReport
    converted: tuple[ModelReport, ...]
    data: DataReport
    dtype: str
    device: str
    versions: Versions
