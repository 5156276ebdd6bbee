"""What a runner hands over: one file of NumPy arrays, which every environment can write and read."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np


def save_result(
    path: Path,
    *,
    logprobs: Sequence[np.ndarray],
    greedy: Sequence[Sequence[int]],
    bytes_per_token: float,
    version: str,
) -> None:
    """Save log-probabilities of the token behind each prompt, the tokens written greedily, and the cache's size."""
    longest = max(map(len, greedy))
    padded = np.array([[*tokens, *[-1] * (longest - len(tokens))] for tokens in greedy])
    np.savez(path, logprobs=np.stack(logprobs), greedy=padded, bytes_per_token=bytes_per_token, version=version)
