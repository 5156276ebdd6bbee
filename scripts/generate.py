"""Let a converted checkpoint speak through stock transformers: no transmla is imported here.

Usage: python scripts/generate.py FOLDER [PROMPT ...]
"""

from __future__ import annotations

import sys

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel
from transformers.utils import logging

PROMPTS = ("The capital of France is", "Water is made of two elements,")


@torch.inference_mode()
def cached_numbers(model: PreTrainedModel, input_ids: torch.Tensor) -> float:
    """Count the numbers that the cache holds per token and layer after reading a prompt."""
    layers = model(input_ids, use_cache=True).past_key_values.layers
    return sum(layer.keys.numel() + layer.values.numel() for layer in layers) / input_ids.numel() / len(layers)


def main(folder: str, *prompts: str) -> None:
    """Continue each prompt greedily and show what the cache holds."""
    logging.disable_progress_bar()
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    for prompt in prompts or PROMPTS:
        inputs = tokenizer(prompt, return_tensors="pt")
        output = model.generate(**inputs, max_new_tokens=40, do_sample=False)
        print(f"> {tokenizer.decode(output[0], skip_special_tokens=True)}\n")
    kind = type(model).__name__
    print(f"{kind} caches {cached_numbers(model, inputs.input_ids):g} numbers per token and layer.")


if __name__ == "__main__":
    main(*sys.argv[1:])
