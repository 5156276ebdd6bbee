"""What ``transmla generate`` is asked."""

from __future__ import annotations

from typing import ClassVar

from pydantic import Field

from transmla.config.request import OutputDtype, SourceRequest


class GenerateRequest(SourceRequest):
    """What ``transmla generate`` is asked."""

    ARGUMENTS: ClassVar[tuple[str, ...]] = ("model", "prompt")

    prompt: str = Field(description="What the model answers or continues; - reads it from standard input.")
    system: str | None = Field(None, description="System message before the prompt, for models with a chat template.")
    no_chat_template: bool = Field(False, description="Continue the prompt as it is, chat template or not.")
    max_new_tokens: int = Field(256, ge=1, description="Stop after this many tokens.")
    do_sample: bool | None = Field(
        None,
        description="Draw tokens rather than take the likeliest. By default as the model's generation_config says, and "
        "yes where a temperature, top-p or top-k is given.",
    )
    temperature: float | None = Field(None, ge=0, description="Below 1 prefers likely tokens; 0 is --no-do-sample.")
    top_p: float | None = Field(None, gt=0, le=1, description="Draw from the likeliest tokens that have this share.")
    top_k: int | None = Field(None, ge=0, description="Draw from this many of the likeliest tokens; 0 is all.")
    repetition_penalty: float | None = Field(None, gt=0, description="Above 1 avoids tokens that are there already.")
    seed: int = Field(0, ge=0, description="Seed of the drawing (default 0): the same command gives the same text.")
    no_absorb: bool = Field(
        False, description="Decode as stock transformers does, which expands the latent of every token at every step."
    )
    dtype: OutputDtype = Field("auto", description="Type in which the model runs; auto is the stored one.")
    device: str = Field("auto", description="Device of the computation: auto, cpu, cuda, cuda:1, mps.")
