"""How fast the device's memory is, and with it how fast decoding could be at best."""

from __future__ import annotations

from statistics import median

import torch
from transformers import PreTrainedModel

from transmla.bench.timing import clock


def measure_bandwidth(device: torch.device, *, num_bytes: int, num_rounds: int = 10) -> float:
    """Return bytes per second of a copy, reading and writing counted, the median of the rounds.

    ``num_bytes`` should exceed every cache of the processor many times.
    """
    source = torch.ones(num_bytes // 4, dtype=torch.float32, device=device)
    copy = torch.empty_like(source)
    copy.copy_(source)
    seconds = []
    for _ in range(num_rounds):
        started = clock(device)
        copy.copy_(source)
        seconds.append(clock(device) - started)
    return 2 * source.nbytes / median(seconds)


def bytes_per_step(model: PreTrainedModel, *, cache_bytes: int) -> int:
    """Return the least that a step of decoding must read: every weight once, and the cache.

    Of an embedding that is not the head as well it reads a row a sequence, which is nothing.
    """
    weights = sum(parameter.nbytes for parameter in model.parameters())
    embedding, head = model.get_input_embeddings().weight, model.get_output_embeddings().weight
    return weights - (0 if embedding is head else embedding.nbytes) + cache_bytes
