"""Random checkpoints, small and complete: what a hub download looks like, made in a moment.

No two sizes are equal, so a swapped axis cannot pass; norms are not ones, so a forgotten norm cannot pass; attention is
neither uniform nor one-hot, so a wrong logit shows.
"""

from __future__ import annotations

import copy
import json
import math
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import (
    AutoModelForCausalLM,
    GenerationConfig,
    LlamaConfig,
    MinistralConfig,
    MistralConfig,
    MixtralConfig,
    Phi3Config,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen3Config,
    Qwen3MoeConfig,
)
from transformers.core_model_loading import revert_weight_conversion

FAMILIES: dict[str, tuple[type[PreTrainedConfig], dict[str, Any]]] = {
    "llama": (LlamaConfig, {}),
    "mistral": (MistralConfig, {"sliding_window": None}),
    "ministral": (MinistralConfig, {"sliding_window": 512, "layer_types": ["sliding_attention", "full_attention"]}),
    "qwen2": (Qwen2Config, {}),
    "qwen3": (Qwen3Config, {}),
    "phi3": (Phi3Config, {"sliding_window": None, "pad_token_id": None}),
    "mixtral": (MixtralConfig, {"num_local_experts": 5, "num_experts_per_tok": 2, "intermediate_size": 28}),
    "qwen3_moe": (
        Qwen3MoeConfig,
        {"num_experts": 5, "num_experts_per_tok": 3, "moe_intermediate_size": 28, "norm_topk_prob": True},
    ),
}

SIZES = {
    "vocab_size": 401,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-5,
    "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
    "tie_word_embeddings": False,
    "bos_token_id": 0,
    "eos_token_id": 1,
}

TOKENIZER_SIZE = 389
CHAT_TEMPLATE = "{% for message in messages %}{{ message.role }}: {{ message.content }}\n{% endfor %}"

TEXT = """\
A mill stood where the river left the hills. Its wheel had turned for two hundred years, and the stone that ground the
corn had been cut twice. When the miller's daughter took it over she kept the wheel and sold the stone.

Every morning she wrote three numbers into a book: the height of the water, the speed of the wheel, and how many lamps
it had kept alight. The book was dull, and she never missed a day. "What is not measured," she said, "is only believed."

In the ninth winter the river froze. The village asked whether the lamps would go out; she opened her book, turned back
to a cold month, and answered: not before Thursday, and only in the upper street. They went out on Friday.
"""


def tiny_checkpoint(
    folder: Path,
    *,
    family: str = "llama",
    shards: int = 1,
    dtype: torch.dtype = torch.float32,
    packed: bool = False,
    seed: int = 0,
    **config_overrides: Any,
) -> Path:
    """Write a random checkpoint into ``folder`` and return it.

    Args:
        folder: Created where it does not exist.
        family: A key of ``FAMILIES``.
        shards: Number of weight files; from two on, the ``k_proj`` and ``v_proj`` of a layer lie in different ones.
        dtype: Type of the stored weights.
        packed: Whether experts are stored as transformers 5 holds them, and not one by one.
        seed: Seed of the weights.
        config_overrides: Fields of the model's config.
    """
    folder.mkdir(parents=True, exist_ok=True)
    config_class, fields = FAMILIES[family]
    # Some configs change the dictionaries that they are given.
    keys = copy.deepcopy({**SIZES, **fields, "dtype": dtype, **config_overrides})
    model = random_model(config_class(**keys), seed=seed)
    model.config.architectures = [type(model).__name__]
    model.config.save_pretrained(folder)
    GenerationConfig(bos_token_id=0, eos_token_id=1, max_length=64).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    (folder / "LICENSE").write_text("Anyone may do anything with these random numbers.\n", encoding="utf-8")
    _save_weights(model, folder, shards=shards, packed=packed)
    return folder


def random_model(config: PreTrainedConfig, *, seed: int = 0) -> PreTrainedModel:
    """Make a model whose hidden states are about 1 and whose attention logits have a standard deviation of 1 to 2."""
    model = AutoModelForCausalLM.from_config(config, dtype=config.dtype)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            noise = torch.randn(weight.shape, generator=generator)
            weight.copy_(_center(name) + _spread(name, weight) * noise)
    return model.eval()


def _center(name: str) -> float:
    return 1.0 if "norm" in name else 0.0


def _spread(name: str, weight: torch.Tensor) -> float:
    if "norm" in name or name.endswith("bias"):
        return 0.2
    if "embed" in name:
        return 0.3  # small enough for a tied head, whose logits it also scales
    gain = 1.25 if "q_proj" in name or "k_proj" in name else 1.0
    return gain / math.sqrt(weight.shape[-1])


def _save_weights(model: PreTrainedModel, folder: Path, *, shards: int, packed: bool) -> None:
    weights = model.state_dict()
    if not packed:
        single = revert_weight_conversion(model, weights)
        # In the model's order, what has been taken apart at the end.
        weights = {name: single[name] for name in sorted(single, key=list(weights | single).index)}
    weights = {name: tensor.clone(memory_format=torch.contiguous_format) for name, tensor in weights.items()}
    if model.config.tie_word_embeddings:
        del weights["lm_head.weight"]
    if shards == 1:
        save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
        return

    # Neighboring modules, such as k_proj and v_proj, go into different files.
    modules = list(dict.fromkeys(name.rpartition(".")[0] for name in weights))
    file_of = {
        name: f"model-{modules.index(name.rpartition('.')[0]) % shards + 1:05d}-of-{shards:05d}.safetensors"
        for name in weights
    }
    for file in sorted(set(file_of.values())):
        save_file({n: w for n, w in weights.items() if file_of[n] == file}, folder / file, metadata={"format": "pt"})
    total = sum(weight.nbytes for weight in weights.values())
    index = {"metadata": {"total_size": total}, "weight_map": file_of}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2), encoding="utf-8")


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """Train a tokenizer of ``TOKENIZER_SIZE`` tokens on ``TEXT``; like Llama's, it puts ``<s>`` before a text."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=TOKENIZER_SIZE,
        special_tokens=["<s>", "</s>"],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator([TEXT], trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", 0)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<s>",
        eos_token="</s>",
        chat_template=CHAT_TEMPLATE,
    )
