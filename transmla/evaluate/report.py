"""What an evaluation found, as data that reads and writes JSON."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict

Form = Literal["stock", "absorbed"]
"""How attention runs: as stock transformers has it, or on the cached latent itself."""


class Record(BaseModel):
    """Frozen, and nothing in it that nobody declared."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class ModelReport(Record):
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


class DataReport(Record):
    """The text: enough to know whether two reports speak of the same tokens."""

    dataset: str
    num_tokens: int
    num_windows: int
    window: int
    num_positions: int
    sha256: str


class Versions(Record):
    """The libraries that computed the numbers."""

    transmla: str
    torch: str
    transformers: str


class EvalReport(Record):
    """The source, the converted models in the order asked for, and how they were measured."""

    source: ModelReport
    converted: tuple[ModelReport, ...]
    data: DataReport
    dtype: str
    device: str
    versions: Versions


class GenerationReport(Record):
    """What a model said to one prompt, and what that took.

    ``finish`` is why it stopped: a token that ends the text, the length asked for, or the end of the model's context.
    """

    model: str
    architecture: str
    form: Form
    prompt: str
    text: str
    finish: Literal["stop", "length", "context"]
    sampled: bool
    num_prompt_tokens: int
    num_new_tokens: int
    seconds_to_first_token: float
    tokens_per_second: float | None
    kv_bytes_per_token: int
    kv_numbers_per_token_layer: float
    dtype: str
    device: str
    versions: Versions
