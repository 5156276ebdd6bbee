"""What ``transmla bench`` is asked."""

from __future__ import annotations

from typing import Annotated

from pydantic import BeforeValidator, Field

from transmla.config.comparison import ComparisonRequest
from transmla.config.request import OutputDtype, split_at_commas


class BenchRequest(ComparisonRequest):
    """What ``transmla bench`` is asked."""

    converted: tuple[str, ...] = Field(
        (), description="Converted models: folders or hub ids; each runs as stock does and with absorbed decoding."
    )
    contexts: Annotated[tuple[Annotated[int, Field(ge=2)], ...], BeforeValidator(split_at_commas)] = Field(
        (512, 1024, 2048),
        min_length=1,
        description="Context lengths, in tokens: prompt and new tokens together. Repeat, or separate by commas.",
    )
    batch_sizes: Annotated[tuple[Annotated[int, Field(ge=1)], ...], BeforeValidator(split_at_commas)] = Field(
        (1,), min_length=1, description="Sequences at once. Repeat, or separate by commas."
    )
    num_new_tokens: int = Field(32, ge=1, description="Tokens decoded one after the other; they end the context.")
    num_rounds: int = Field(3, ge=1, description="Timed runs of each, after one that warms up and measures memory.")
    seed: int = Field(0, ge=0, description="Seed of the random prompts.")
    dtype: OutputDtype = Field("auto", description="Type in which all models run; auto is the source's stored one.")
    device: str = Field("auto", description="Device of the computation: auto, cpu, cuda, cuda:1, mps.")
