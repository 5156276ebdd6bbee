"""What every engine is compared with: prompts from the test text, and what stock transformers in float32 makes of them.

Usage: run_transformers.py CHECKPOINT TEXT PROMPTS.json OUTPUT.npz; the prompts are written if they are not there.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
import transformers
from result import save_result
from transformers import AutoModelForCausalLM, AutoTokenizer

from transmla.modeling.kv_cache import measure_cache

NUM_NEW_TOKENS = 32
# Of many lengths, so that no engine's blocks are always full.
LENGTHS = (7, 48, 89, 130, 171, 212)


def main(checkpoint: Path, text: Path, prompts: Path, output: Path) -> None:
    if not prompts.exists():
        prompts.write_text(json.dumps({"prompts": choose_prompts(checkpoint, text), "num_new_tokens": NUM_NEW_TOKENS}))
    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32).eval()
    logprobs, greedy = [], []
    with torch.inference_mode():
        for prompt in json.loads(prompts.read_text())["prompts"]:
            tokens = torch.tensor([prompt])
            logprobs.append(model(tokens).logits[0, -1].double().log_softmax(-1).numpy())
            written = model.generate(
                tokens, attention_mask=torch.ones_like(tokens), max_new_tokens=NUM_NEW_TOKENS, do_sample=False
            )
            greedy.append(written[0, len(prompt) :].tolist())
    save_result(
        output,
        logprobs=logprobs,
        greedy=greedy,
        bytes_per_token=measure_cache(model).bytes_per_token,
        version=f"transformers {transformers.__version__}",
    )


def choose_prompts(checkpoint: Path, text: Path) -> list[list[int]]:
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    paragraphs = [line for line in text.read_text(encoding="utf-8").splitlines() if len(line) > 1200]
    chosen = paragraphs[:: len(paragraphs) // len(LENGTHS)]
    return [tokenizer(line)["input_ids"][:length] for line, length in zip(chosen, LENGTHS, strict=False)]


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
