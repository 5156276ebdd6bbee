"""How tokens are chosen: flags over the model's own ``generation_config.json``."""

from __future__ import annotations

import reprlib
from collections.abc import Iterator
from typing import Any

from transformers import GenerationConfig

from transmla.config import GenerateRequest
from transmla.errors import UsageError
from transmla.generate.generation_config import IDLE, SAMPLING, Heard, Settings


def settle_sampling(
    request: GenerateRequest, heard: Heard, *, num_prompt_tokens: int, max_new_tokens: int
) -> GenerationConfig:
    """Combine flags over the model's own generation_config.

    Raises:
        UsageError: flags that shape the drawing although nothing is drawn.
    """
    chosen = {name: getattr(request, name) for name in ("temperature", "top_p", "top_k")}
    chosen = {name: value for name, value in chosen.items() if value is not None}
    greedy = request.do_sample is False or _is_cold(chosen.get("temperature"))
    if greedy and (idle := [name for name, value in chosen.items() if name != "temperature" or not _is_cold(value)]):
        flags = " and ".join(f"--{name.replace('_', '-')}" for name in idle)
        raise UsageError(f"Nothing is drawn with --no-do-sample or --temperature 0: drop it, or drop {flags}.")
    if greedy and request.do_sample:
        raise UsageError("--do-sample draws and --temperature 0 does not: drop one of them.")
    own = heard.do_sample and not _is_cold(heard.temperature)
    values = heard.model_dump(exclude_none=True, exclude={"max_length", "min_length", "stop_strings"})
    values["do_sample"] = not greedy and bool(request.do_sample or chosen or own)
    if not values["do_sample"]:
        values = {name: value for name, value in values.items() if name not in SAMPLING}
        chosen = {}
    if request.repetition_penalty is not None:
        values["repetition_penalty"] = request.repetition_penalty
    # Of both, Transformers takes the one of the new tokens, and warns of what is more than there will be.
    least = heard.min_new_tokens if heard.min_new_tokens is not None else (heard.min_length or 0) - num_prompt_tokens
    if least > 0:
        values["min_new_tokens"] = min(least, max_new_tokens)
    values |= {
        **chosen,
        "max_new_tokens": max_new_tokens,
        "pad_token_id": next(iter(listed_ids(heard.eos_token_id)), 0),
        "return_dict_in_generate": True,
    }
    return GenerationConfig(**values)


def overruled(
    request: GenerateRequest, settings: Settings, *, num_prompt_tokens: int, max_new_tokens: int
) -> Iterator[str]:
    """Yield a line for each thing that a flag, or its default, or Transformers overrules."""
    heard = settings.heard
    length = None if heard.max_length is None else heard.max_length - num_prompt_tokens
    # Of both, Transformers takes the one of the new tokens.
    name, own = ("max_length", length) if heard.max_new_tokens is None else ("max_new_tokens", heard.max_new_tokens)
    if own is not None and own < max_new_tokens:
        value = getattr(heard, name)
        yield f"Set aside from {settings.where}: {name} {value}, for --max-new-tokens is {request.max_new_tokens}."
    flags = (request.do_sample, request.temperature, request.top_p, request.top_k)
    if not heard.do_sample and all(flag is None for flag in flags):
        own_values = heard.model_dump(include=set(SAMPLING), exclude_none=True)
        idle = [f"{name} {reprlib.repr(v)}" for name, v in own_values.items() if v != IDLE.get(name)]
        if idle:
            yield (
                f"Of no effect in {settings.where}, as in transformers: {', '.join(idle)}, for it does not say "
                "do_sample; --do-sample does."
            )


def _is_cold(temperature: float | None) -> bool:
    # Logits divided by less are no numbers any more.
    return temperature is not None and temperature < 1e-5


def listed_ids(value: Any) -> list[Any]:
    """Return the token ids that a config gives one by one or as a list."""
    return value if isinstance(value, list) else [] if value is None else [value]
