"""What a model said to one prompt, and what that took."""

from __future__ import annotations

from typing import Literal

from transmla.records import Form, Record, Versions


class GenerationReport(Record):
    """What a model said to one prompt, and what that took.

    ``finish`` is why it stopped: a token or a string that ends the text, the length asked for, the end of the model's
    context, or the time that its generation config allows. ``notes`` are what was not heard of that config, and why.
    """

    model: str
    architecture: str
    form: Form
    prompt: str
    text: str
    finish: Literal["stop", "length", "context", "time"]
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
    notes: tuple[str, ...] = ()
