"""Train a small Llama (or another family) from nothing on a text: a model that no choice in transmla has been made on.

Eight query heads of 32 and a few key/value heads, about five million parameters, with a tokenizer of its own. It is no
good at language, but its attention has learnt something, which that of a random model has not.

Usage: python scripts/experiments/train_small.py TEXT OUTPUT_DIR [--family llama] [--steps 600]
       [--num-key-value-heads 2]
"""

from __future__ import annotations

import argparse
import math
import sys
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from tqdm import tqdm
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

VOCAB_SIZE = 4096
WARMUP = 50
# What a family has beyond the sizes that all share; a mixture computes as much for a token as the others.
FAMILIES = {
    "llama": {},
    "qwen2": {},
    "qwen3": {},
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2, "intermediate_size": 352, "sliding_window": None},
}


def train_tokenizer(text: str) -> PreTrainedTokenizerFast:
    """Learn a byte-level BPE vocabulary from the text."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=["<|end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(text.splitlines(keepends=True), trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|end|>")


def make_model(family: str, num_key_value_heads: int, context: int) -> PreTrainedModel:
    """Return the untrained model."""
    sizes = {
        "vocab_size": VOCAB_SIZE,
        "hidden_size": 256,
        "intermediate_size": 704,
        "num_hidden_layers": 6,
        "num_attention_heads": 8,
        "num_key_value_heads": num_key_value_heads,
        "head_dim": 32,
        "max_position_embeddings": context,
        "tie_word_embeddings": True,
    }
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **{**sizes, **FAMILIES[family]}))


def main() -> None:
    """Train and save."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("text", type=Path)
    parser.add_argument("output_dir", type=Path)
    parser.add_argument("--family", choices=list(FAMILIES), default="llama")
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--context", type=int, default=256, help="tokens in a window")
    parser.add_argument("--num-key-value-heads", type=int, default=2)
    parser.add_argument("--learning-rate", type=float, default=2e-3)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    if options.output_dir.exists():
        sys.exit(f"{options.output_dir} exists: remove it or name another folder.")

    torch.manual_seed(options.seed)
    text = options.text.read_text(encoding="utf-8")
    tokenizer = train_tokenizer(text)
    tokens = torch.tensor(tokenizer(text, verbose=False)["input_ids"])
    model = make_model(options.family, options.num_key_value_heads, options.context)
    optimizer = torch.optim.AdamW(model.parameters(), lr=options.learning_rate, betas=(0.9, 0.95), weight_decay=0.1)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer,
        lambda step: min(1, (step + 1) / WARMUP) * (0.05 + 0.95 * (1 + math.cos(math.pi * step / options.steps)) / 2),
    )
    bar = tqdm(range(options.steps), desc="Training")
    for _ in bar:
        starts = torch.randint(len(tokens) - options.context, (options.batch_size, 1))
        batch = tokens[starts + torch.arange(options.context)]
        loss = model(input_ids=batch, labels=batch).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        bar.set_postfix(loss=f"{loss.item():.3f}")
    model.save_pretrained(options.output_dir)
    tokenizer.save_pretrained(options.output_dir)
    print(f"{options.output_dir}: {model.num_parameters():,} parameters, {len(tokens):,} tokens of text")


if __name__ == "__main__":
    main()
