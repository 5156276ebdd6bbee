"""Plan conversions of models that fit no machine here, from configs and headers: weights that are holes take no room.

Usage: python scripts/plan_large.py
"""

from __future__ import annotations

import os
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, MixtralConfig, PretrainedConfig

from transmla.arch.skeleton import Skeleton
from transmla.arch.spec import describe, load_config
from transmla.arch.weight_names import stored_shapes
from transmla.checkpoint.safetensors import SINGLE_FILE
from transmla.checkpoint.shards import TensorPlan, plan_shards
from transmla.config import ConvertRequest
from transmla.convert import plan as planning

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


def main() -> None:
    # What is planned here need not fit on this disk.
    nothing: Any = lambda *arguments: None  # noqa: E731
    planning.check_free_space = nothing
    print(f"{'':16}{'source, GB':>12}{'seconds':>9}{'peak, GB':>10}{'output, GB':>12}{'files':>7}  sizes")
    for name, config in MODELS.items():
        with tempfile.TemporaryDirectory(prefix="holes-") as scratch:
            folder = Path(scratch) / "source"
            size = make_holes(folder, config)
            request = ConvertRequest(
                model=str(folder), output_dir=Path(scratch) / "out", kv_ratio=0.25, calibration=("text.txt",)
            )
            started = time.perf_counter()
            summary = planning.plan_conversion(request).summary
            seconds = time.perf_counter() - started
        print(
            f"{name:16}{size / 1e9:12,.0f}{seconds:9.1f}{summary.peak_memory_bytes / 1e9:10.1f}"
            f"{summary.output_bytes / 1e9:12,.0f}{summary.num_shards:7}  "
            f"{summary.qk_rope_head_dim} + {summary.kv_lora_rank}"
        )


if __name__ == "__main__":
    main()
