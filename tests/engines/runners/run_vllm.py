"""Runs in the environment of vLLM. Usage: run_vllm.py CHECKPOINT PROMPTS.json OUTPUT.npz.

VLLM_CPU_KVCACHE_SPACE has to say how many GiB the cache takes altogether.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import numpy as np
import vllm
from result import save_result
from vllm import LLM, SamplingParams


def main(checkpoint: Path, prompts: Path, output: Path) -> None:
    asked = json.loads(prompts.read_text())
    model = LLM(
        model=str(checkpoint),
        dtype="float32",
        max_model_len=1024,
        max_logprobs=-1,
        # AMX kernels, where there are any, compute in bfloat16 only.
        attention_config={"backend": "CPU_MLA"},
        enforce_eager=True,
        enable_prefix_caching=False,
    )
    given = [{"prompt_token_ids": prompt} for prompt in asked["prompts"]]
    logprobs = []
    for answer in model.generate(given, SamplingParams(temperature=0, max_tokens=1, logprobs=-1)):
        [position] = answer.outputs[0].logprobs
        row = np.full(len(position), np.nan)
        for token, entry in position.items():
            row[token] = entry.logprob
        logprobs.append(row)
    written = model.generate(given, SamplingParams(temperature=0, max_tokens=asked["num_new_tokens"]))
    cache = model.llm_engine.vllm_config.cache_config
    save_result(
        output,
        logprobs=logprobs,
        greedy=[list(answer.outputs[0].token_ids) for answer in written],
        bytes_per_token=int(os.environ["VLLM_CPU_KVCACHE_SPACE"]) * 2**30 / (cache.num_gpu_blocks * cache.block_size),
        version=f"vllm {vllm.__version__}",
    )


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
