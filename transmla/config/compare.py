"""What the commands are asked that look at models: ``eval``, ``bench``, ``generate`` and ``verify``."""

from __future__ import annotations

from typing import Annotated

from pydantic import BeforeValidator, Field

from transmla.config.request import (
    BOS,
    Bos,
    ComputeDtype,
    OutputDtype,
    Request,
    SourceRequest,
    as_tuple,
    split_at_commas,
)


class ComparisonRequest(Request):
    """A source and what it is compared with."""

    source: str = Field(description="The model that the others are compared with: hub id, id@revision or folder.")
    converted: tuple[str, ...] = Field((), description="Converted models: folders or hub ids.")
    gguf_file: str | None = Field(None, description="Name of a GGUF file inside SOURCE.")
    revision: str | None = Field(None, description="Branch, tag or commit of a hub SOURCE.")
    token: str | None = Field(None, description="Hub token; the logged-in one is used by default.", exclude=True)


class EvalRequest(ComparisonRequest):
    """What ``transmla eval`` is asked."""

    dataset: Annotated[tuple[str, ...], BeforeValidator(as_tuple)] = Field(
        (), description="Text, JSONL or parquet file, or hub data set name[:config[:split]]; repeat for several."
    )
    text_column: str | None = Field(None, description="Column that holds the text; found by itself when there is one.")
    bos: Bos = BOS
    window: int = Field(1024, ge=2, description="Tokens that are read at once.")
    stride: int | None = Field(
        None,
        ge=1,
        description="Tokens by which windows advance, and only new ones count; by default they stand side by side.",
    )
    per_document: bool = Field(False, description="Judge each row of a data set by itself.")
    max_tokens: int | None = Field(
        None, ge=2, description="Stop after this many tokens of each data set; the whole text by default."
    )
    tasks: Annotated[tuple[str, ...], BeforeValidator(split_at_commas)] = Field(
        (),
        description="Tasks of lm-eval by name, or YAML or JSONL files of them. Repeat, or separate by commas. Needs "
        "lm-eval.",
    )
    num_fewshot: int | None = Field(None, ge=0, description="Solved items before each; by default what the task says.")
    limit: int | None = Field(None, ge=1, description="Items of each task; all by default.")
    contexts: Annotated[tuple[Annotated[int, Field(ge=2)], ...], BeforeValidator(split_at_commas)] = Field(
        (),
        description="Lengths, in tokens, at which models look for a needle in a haystack, and copy. Repeat, or "
        "separate by commas.",
    )
    num_depths: int = Field(5, ge=1, description="Depths at which needles are hidden, from start to end.")
    num_trials: int = Field(8, ge=1, description="Texts for each length and depth.")
    greedy_prompts: int = Field(
        0,
        ge=0,
        description="Windows of the first data set behind whose starts the source writes, and the others follow.",
    )
    greedy_tokens: int = Field(128, ge=1, description="Tokens that it writes.")
    per_layer: bool = Field(
        False, description="Put the converted layers into the source one at a time, to see where the loss comes from."
    )
    layer_windows: int = Field(4, ge=1, description="Windows of the first data set for --per-layer.")
    speed_contexts: Annotated[tuple[Annotated[int, Field(ge=64)], ...], BeforeValidator(split_at_commas)] = Field(
        (), description="Context lengths at which all models are timed, as bench does. Repeat, or separate by commas."
    )
    batch_size: int = Field(1, ge=1, description="Windows, or answers, per forward pass.")
    dtype: ComputeDtype = Field("float32", description="Type in which the models run.")
    device: str = Field("auto", description="Device of the computation: auto, cpu, cuda, cuda:1, mps.")
    no_cache: bool = Field(
        False,
        description="Measure everything again, and keep nothing; results are otherwise kept in ~/.cache/transmla/eval, "
        "or under $TRANSMLA_CACHE.",
    )


class GenerateRequest(SourceRequest):
    """What ``transmla generate`` is asked."""

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
    stock: bool = Field(
        False, description="Decode as stock transformers does, which expands the latent of every token at every step."
    )
    dtype: OutputDtype = Field("auto", description="Type in which the model runs; auto is the stored one.")
    device: str = Field("auto", description="Device of the computation: auto, cpu, cuda, cuda:1, mps.")


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


class VerifyRequest(Request):
    """What ``transmla verify`` is asked."""

    model: str = Field(description="The checkpoint: folder, hub id or id@revision.")
    source: str | None = Field(
        None, description="The model that it was converted from: compare the logits on a few short texts."
    )
    gguf_file: str | None = Field(None, description="Name of a GGUF file inside --source.")
    revision: str | None = Field(None, description="Branch, tag or commit of a hub MODEL.")
    token: str | None = Field(None, description="Hub token; the logged-in one is used by default.", exclude=True)
    device: str = Field("auto", description="Device of the comparison: auto, cpu, cuda, cuda:1, mps.")
