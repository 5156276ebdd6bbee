"""Keys of config.json that transformers does not read: harmless for sure, or told.

The class that computes a model ignores what it does not know, and so does the result. Whoever wrote the key meant
something by it, and another engine may do it.
"""

import re
from collections.abc import Iterator, Mapping
from dataclasses import fields
from types import MappingProxyType
from typing import Any

from transformers import CONFIG_MAPPING, PretrainedConfig

from transmla.arch.families import Family

#: What is known of keys that others read.
READ_ELSEWHERE: Mapping[str, str] = MappingProxyType(
    {"dual_chunk_attention_config": "vLLM's attention in long contexts"}
)

# Read by every class, declared or not; the tensors say which biases there are.
_READ = {
    *("attention_bias", "attention_chunk_size", "head_dim", "layer_types", "model_type"),
    *("original_max_position_embeddings", "partial_rotary_factor", "sliding_window"),
}

# Of training, of tokens, of where a model comes from and of what it was run with; code of its own is never run.
_HARMLESS = re.compile(
    r"""_ .* | .* (drop | dropout | pdrop | dropout_prob) | (.* _)? (aux | z)_loss .* | init_.* | initializer_.*
    | .* _token_(id | index) | tokenizer_.* | (model_)? max_(seq_len | sequence_length | length) | seq_length
    | unsloth_.* | transformers\.js_config | is_llama_config | name_or_path | num_labels | max_window_layers
    | bf16 | fp16 | fp32 | use_flash_attn | flash_attn | gradient_checkpointing | use_cache | pretraining_tp | ep_size
    | auto_map | num_nextn_predict_layers | num_mtp_modules | mtp_.*""",
    re.VERBOSE,
)

_ROPE_COMMON = {"type", "rope_type", "rope_theta", "partial_rotary_factor"}
_ROPE = {
    "linear": {"factor", "original_max_position_embeddings"},
    "dynamic": {"factor"},
    "yarn": {
        *("factor", "original_max_position_embeddings", "attention_factor", "beta_fast", "beta_slow"),
        *("mscale", "mscale_all_dim", "truncate"),
    },
    "longrope": {"factor", "original_max_position_embeddings", "attention_factor", "short_factor", "long_factor"},
    "llama3": {"factor", "original_max_position_embeddings", "low_freq_factor", "high_freq_factor"},
}


def unread_keys(config: PretrainedConfig, family: Family) -> frozenset[str]:
    """Return the names of keys that are set, and that nothing reads which computes the model.

    Args:
        config: of the model, as transformers reads it.
        family: of the model, whose requirements have been checked.
    """
    return frozenset([*_unread(config, family), *_unread_rope(config.rope_parameters)])


def declared_keys(config: PretrainedConfig) -> frozenset[str]:
    """Return the keys that are declared by the class of a model, and by the one that computes it."""
    classes = {type(config)} | {CONFIG_MAPPING[name] for name in {config.model_type} if name in CONFIG_MAPPING}
    return frozenset(config.attribute_map.values()).union(field.name for kind in classes for field in fields(kind))


def _unread(config: PretrainedConfig, family: Family) -> Iterator[str]:
    read = _READ | {row.key for row in family.requirements} | declared_keys(config)
    for name, value in vars(config).items():
        # What the class itself sets is no key.
        own = hasattr(type(config), name)
        if _is_set(value) and not own and name not in read and not _HARMLESS.fullmatch(name):
            yield name


def _unread_rope(parameters: Mapping[str, Any]) -> Iterator[str]:
    read = _ROPE_COMMON | _ROPE.get(parameters["rope_type"], set())
    for name, value in parameters.items():
        if _is_set(value) and name not in read:
            yield f"rope_parameters.{name}"


def _is_set(value: Any) -> bool:
    return not (value is None or value is False or value == 0 or value in ("", [], {}))
