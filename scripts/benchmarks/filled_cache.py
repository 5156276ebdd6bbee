"""Decoding behind a long context without reading one: a cache filled with random numbers.

A step of decoding takes as long whatever the cache holds, and a prompt of 128k tokens would take hours on a CPU.
"""

from __future__ import annotations

from contextlib import nullcontext

import torch
from transformers import Cache, PreTrainedModel
from transformers.cache_utils import DynamicLayer

from transmla.bench.memory import measure_memory
from transmla.bench.timing import Run, cache_nbytes, decode
from transmla.modeling.kv_cache import PreallocatedLayer, cache_of


def fill_cache(model: PreTrainedModel, *, num_tokens: int, batch_size: int, num_new_tokens: int, roomy: bool) -> Cache:
    """Make a cache of the shapes that the model itself gives one, with room for what comes, or stock's."""
    token = torch.zeros((1, 1), dtype=torch.long, device=model.device)
    layers: list[DynamicLayer] = []
    for pattern in cache_of(model.get_decoder()(input_ids=token, use_cache=True)).layers:
        length = num_tokens + num_new_tokens if roomy else num_tokens
        keys, values = (
            tensor.new_empty(batch_size, tensor.shape[1], length, tensor.shape[3]).normal_()
            for tensor in (pattern.keys, pattern.values)
        )
        if roomy:
            layers.append(PreallocatedLayer((keys, values), num_tokens))
            continue
        layer = DynamicLayer()
        layer.lazy_initialization(keys, values)
        layer.keys, layer.values = keys, values
        layers.append(layer)
    return Cache(layers=layers)


@torch.inference_mode()
def run_filled(
    model: PreTrainedModel, *, context: int, batch_size: int, num_new_tokens: int, roomy: bool, memory: bool = False
) -> Run:
    """Decode the last ``num_new_tokens`` of a context whose other tokens are random numbers in the cache."""
    with measure_memory(model.device) if memory else nullcontext() as meter:
        num_tokens = context - num_new_tokens
        cache = fill_cache(
            model, num_tokens=num_tokens, batch_size=batch_size, num_new_tokens=num_new_tokens, roomy=roomy
        )
        token = torch.zeros((batch_size, 1), dtype=torch.long, device=model.device)
        decode_seconds = decode(model, cache, token, num_new_tokens=num_new_tokens)
        decode_bytes = meter.lap() if meter else 0
    return Run(decode_seconds, cache_nbytes(cache), decode_bytes)
