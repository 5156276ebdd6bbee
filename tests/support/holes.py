"""Checkpoints of models that fit no machine here: configs, headers, and weights that are holes and take no room."""

from __future__ import annotations

import os
from pathlib import Path

import torch
from transformers import LlamaConfig, MixtralConfig, PretrainedConfig

from transmla.arch.skeleton import Skeleton
from transmla.arch.spec import describe, load_config
from transmla.arch.weight_names import stored_shapes
from transmla.checkpoint.safetensors import SINGLE_FILE
from transmla.checkpoint.shards import TensorPlan, plan_shards

MODELS: dict[str, PretrainedConfig] = {
    "Llama 70B": LlamaConfig(
        vocab_size=128256,
        hidden_size=8192,
        intermediate_size=28672,
        num_hidden_layers=80,
        num_attention_heads=64,
        num_key_value_heads=8,
        max_position_embeddings=8192,
    ),
    "Llama 405B": LlamaConfig(
        vocab_size=128256,
        hidden_size=16384,
        intermediate_size=53248,
        num_hidden_layers=126,
        num_attention_heads=128,
        num_key_value_heads=8,
        max_position_embeddings=8192,
    ),
    "Mixtral 8x22B": MixtralConfig(
        vocab_size=32000,
        hidden_size=6144,
        intermediate_size=16384,
        num_hidden_layers=56,
        num_attention_heads=48,
        num_key_value_heads=8,
        max_position_embeddings=65536,
        sliding_window=None,
    ),
}


def make_holes(folder: Path, config: PretrainedConfig, *, dtype: torch.dtype = torch.bfloat16) -> int:
    """Write a checkpoint whose weights are holes, and return the size that it says it has."""
    config.save_pretrained(folder)
    read = load_config(folder)
    shapes = stored_shapes(Skeleton(read).shapes, describe(read).family, (), tied=False)
    tensors = [TensorPlan(name, tuple(shape), dtype) for name, shape in shapes.items()]
    [shard] = plan_shards(tensors, max_shard_size=2**50)
    with (folder / SINGLE_FILE).open("wb") as file:
        file.write(shard.header)
    os.truncate(folder / SINGLE_FILE, shard.nbytes)
    return shard.nbytes
