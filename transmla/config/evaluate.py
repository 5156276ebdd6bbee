"""What ``transmla eval`` is asked."""

from __future__ import annotations

from typing import Annotated, Literal, get_args

from pydantic import BeforeValidator, Field

from transmla.config.comparison import ComparisonRequest
from transmla.config.request import BOS, Bos, ComputeDtype, as_tuple, split_at_commas

ProbeKind = Literal["needle", "copy", "passage", "needles", "json", "code"]
"""What a model looks back for."""


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
    needle_lengths: Annotated[tuple[Annotated[int, Field(ge=2)], ...], BeforeValidator(split_at_commas)] = Field(
        (),
        description="Lengths, in tokens, of texts in which models look back, as --probes says. Repeat, or separate by "
        "commas.",
    )
    probes: Annotated[tuple[ProbeKind, ...], BeforeValidator(split_at_commas)] = Field(
        get_args(ProbeKind),
        min_length=1,
        description="What models look back for at --needle-lengths. needle: a number in a haystack; copy: random words "
        "said twice; passage: a passage of the first data set said twice; needles: one of several numbers; json: the "
        "value of a key; code: names of functions. Repeat, or separate by commas.",
    )
    needle_depths: int = Field(5, ge=1, description="Depths at which needles are hidden, from start to end.")
    needle_trials: int = Field(8, ge=1, description="Texts of each kind, for each length and depth.")
    greedy_prompts: int = Field(
        0,
        ge=0,
        description="Windows of the first data set after whose starts the source writes, and the others follow.",
    )
    chat_prompts: int = Field(
        0,
        ge=0,
        description="Built-in questions, laid out by the chat template, that the source answers, and the others read "
        "its answers.",
    )
    greedy_tokens: int = Field(
        128, ge=1, description="Tokens that it writes; an answer to --chat-prompts may end before."
    )
    per_layer: bool = Field(
        False, description="Put the converted layers into the source one at a time, to see where the loss comes from."
    )
    layer_windows: int = Field(4, ge=1, description="Windows of the first data set for --per-layer.")
    bench_contexts: Annotated[tuple[Annotated[int, Field(ge=64)], ...], BeforeValidator(split_at_commas)] = Field(
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
