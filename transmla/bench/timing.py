"""The seconds and bytes of one run: a prompt is read at once, then tokens are decoded one after the other.

Plain calls of the model with its own cache, as ``generate`` makes them, without sampling or stopping.
"""

from __future__ import annotations

import time
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor
from transformers import Cache, PreTrainedModel

from transmla.bench.memory import measure_memory
from transmla.modeling.kv_cache import cache_argument, cache_of, cached_tensors


@dataclass(frozen=True)
class Run:
    """What one run took.

    Attributes:
        decode_seconds: For the tokens after the first.
        cache_bytes: Held by the cache at the end.
        decode_bytes: Most memory at once while decoding, beyond the weights; 0 where it was not measured.
        first_seconds: From the prompt to the first new token; 0 where there was no prompt.
        first_bytes: As ``decode_bytes``, until the first token.
    """

    decode_seconds: float
    cache_bytes: int
    decode_bytes: int = 0
    first_seconds: float = 0.0
    first_bytes: int = 0


@torch.inference_mode()
def run_prompt(
    model: PreTrainedModel, prompt: Int[Tensor, "batch tokens"], *, num_new_tokens: int, memory: bool = False
) -> Run:
    """Read the prompt and decode ``num_new_tokens``, which are all in the cache at the end; ``memory`` takes longer."""
    with measure_memory(prompt.device) if memory else nullcontext() as meter:
        started = clock(prompt.device)
        output = model(input_ids=prompt, use_cache=True, logits_to_keep=1)
        token, cache = output.logits.argmax(-1), cache_of(output)
        del output
        first_seconds = clock(prompt.device) - started
        first_bytes = meter.lap() if meter else 0
        decode_seconds = decode(model, cache, token, num_new_tokens=num_new_tokens)
        decode_bytes = meter.lap() if meter else 0
    return Run(decode_seconds, cache_nbytes(cache), decode_bytes, first_seconds, first_bytes)


def cache_nbytes(cache: Cache) -> int:
    """Return the bytes of what a cache holds."""
    return sum(tensor.nbytes for tensor in cached_tensors(cache))


@torch.inference_mode()
def decode(model: PreTrainedModel, cache: Cache, token: Int[Tensor, "batch 1"], *, num_new_tokens: int) -> float:
    """Feed the likeliest token back ``num_new_tokens`` times and return the seconds."""
    held: dict[str, Any] = {cache_argument(model): cache}
    started = clock(token.device)
    for _ in range(num_new_tokens):
        logits = model(input_ids=token, use_cache=True, logits_to_keep=1, **held).logits
        token = logits.argmax(-1)
    return clock(token.device) - started


def clock(device: torch.device) -> float:
    """Return the time at which the device has done all that it was given, in seconds."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)
    return time.perf_counter()
