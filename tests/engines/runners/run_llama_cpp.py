"""Runs in the environment of llama.cpp (xllamacpp). Usage: run_llama_cpp.py MODEL.gguf PROMPTS.json OUTPUT.npz."""

from __future__ import annotations

import json
import os
import re
import sys
import tempfile
from pathlib import Path

import numpy as np
import xllamacpp
from result import save_result

CONTEXT = 1024


def main(model: Path, prompts: Path, output: Path) -> None:
    asked = json.loads(prompts.read_text())
    params = xllamacpp.CommonParams()
    params.model.path = str(model)
    params.n_ctx, params.n_parallel, params.n_gpu_layers, params.warmup = CONTEXT, 1, 0, False
    params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
    params.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = os.cpu_count() or 1
    # The size of the cache is said on stderr and nowhere else, and only to those who want to know much.
    params.verbosity = 4
    with tempfile.TemporaryFile() as log:
        stderr = os.dup(2)
        os.dup2(log.fileno(), 2)
        try:
            server = xllamacpp.Server(params)
        finally:
            os.dup2(stderr, 2)
            log.seek(0)
            said = log.read().decode(errors="replace")
    sizes = re.findall(r"llama_kv_cache: size = +([0-9.]+) MiB", said)
    assert sizes, f"llama.cpp did not say how large its cache is: {said}"
    vocabulary = int(re.findall(r"n_vocab += (\d+)", said)[0])
    logprobs, greedy = [], []
    for prompt in asked["prompts"]:
        first = complete(server, prompt, num_new_tokens=1, num_probs=vocabulary)[0]
        row = np.full(vocabulary, np.nan)
        for entry in first["top_logprobs"]:
            row[entry["id"]] = entry["logprob"]
        logprobs.append(row)
        written = complete(server, prompt, num_new_tokens=asked["num_new_tokens"], num_probs=1)
        greedy.append([entry["id"] for entry in written])
    save_result(
        output,
        logprobs=logprobs,
        greedy=greedy,
        bytes_per_token=sum(map(float, sizes)) * 2**20 / CONTEXT,
        version=f"xllamacpp {xllamacpp.__version__}",
    )


def complete(server: xllamacpp.Server, prompt: list[int], *, num_new_tokens: int, num_probs: int) -> list[dict]:
    answer = server.handle_completions(
        {
            "prompt": prompt,
            "n_predict": num_new_tokens,
            "n_probs": num_probs,
            "temperature": 0,
            "cache_prompt": False,
        }
    )
    assert "choices" in answer, f"llama.cpp answered: {answer}"
    return answer["choices"][0]["logprobs"]["content"]


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
