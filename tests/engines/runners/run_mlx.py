"""Runs in the environment of MLX. Usage: run_mlx.py CHECKPOINT PROMPTS.json OUTPUT.npz."""

from __future__ import annotations

import json
import sys
from importlib.metadata import version
from pathlib import Path

import mlx.core as mx
import numpy as np
from mlx_lm import load
from mlx_lm.models.cache import make_prompt_cache
from result import save_result


def main(checkpoint: Path, prompts: Path, output: Path) -> None:
    asked = json.loads(prompts.read_text())
    model, tokenizer = load(str(checkpoint))
    logprobs, greedy, bytes_per_token = [], [], 0.0
    for prompt in asked["prompts"]:
        cache = make_prompt_cache(model)
        logits = model(mx.array(prompt)[None], cache=cache)[0, -1]
        logprobs.append(np.array(logits - mx.logsumexp(logits), dtype=np.float64))
        written: list[int] = []
        while len(written) < asked["num_new_tokens"]:
            written.append(mx.argmax(logits).item())
            if written[-1] in tokenizer.eos_token_ids:
                break
            logits = model(mx.array(written[-1:])[None], cache=cache)[0, -1]
        greedy.append(written)
        # It is made larger some hundred tokens at a time.
        held = [array for layer in cache for array in (layer.keys, layer.values)]
        bytes_per_token = sum(array.nbytes / array.shape[2] for array in held)
    save_result(
        output,
        logprobs=logprobs,
        greedy=greedy,
        bytes_per_token=bytes_per_token,
        version=f"mlx {version('mlx')}, mlx-lm {version('mlx-lm')}",
    )


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
