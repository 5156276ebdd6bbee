"""Other values for the keys of a config.json: guessed from the present one, or chosen where a guess is no test."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tests.convert.models import checkpoint_with_a_common_direction, read_config
from tests.factory import FAMILIES as CONFIGS
from tests.factory import tiny_checkpoint
from transmla.arch.families import FAMILIES

CONTEXT = 48

_ORIGINAL = {"original_max_position_embeddings": 24, "rope_theta": 1e4}
_YARN = {"rope_type": "yarn", "factor": 4.0, **_ORIGINAL}
_LONGROPE = {
    "rope_type": "longrope",
    "short_factor": [1 + index / 8 for index in range(8)],
    "long_factor": [2.0 + index for index in range(8)],
    "rope_theta": 1e4,
    "original_max_position_embeddings": 64,
}
ROPES: tuple[Any, ...] = (
    {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0},
    {**_YARN, "attention_factor": 1.5},
    {**_LONGROPE, "attention_factor": 1.5},
    {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5},
    {"full_attention": {"rope_type": "default", "rope_theta": 1e3}, "sliding_attention": {"rope_theta": 1e2}},
)
#: One code computes them for all families: these are for the first.
MORE_ROPES: tuple[Any, ...] = (
    None,
    {"rope_type": "default", "rope_theta": 1e3},
    {"rope_type": "default", "rope_theta": 1e4, "factor": 4.0},
    {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 4.0},
    _YARN,
    {"rope_type": "yarn", "factor": 4.0, "rope_theta": 1e4},
    {**_YARN, "factor": None},
    {**_YARN, "truncate": False, "beta_fast": 8.0, "beta_slow": 2.0},
    {**_YARN, "mscale": 1.0, "mscale_all_dim": 0.5},
    {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, **_ORIGINAL},
    {"rope_type": "proportional", "rope_theta": 1e4, "partial_rotary_factor": 0.5},
    {**_LONGROPE, "original_max_position_embeddings": 24},
    _LONGROPE,
)

_LAYER_TYPES: tuple[Any, ...] = (
    None,
    ["full_attention", "full_attention"],
    ["full_attention", "sliding_attention"],
    ["sliding_attention", "sliding_attention"],
    ["full_attention", "chunked_attention"],
    ["linear_attention", "full_attention"],
)
_WINDOWS: tuple[Any, ...] = (24, 47, 48, 49, None, 0)

VALUES: dict[str, tuple[Any, ...]] = {
    "architectures": (["LlamaModel"], None),
    "attention_chunk_size": (24,),
    "attention_dropout": (0.5,),
    "attn_implementation": ("eager", "sdpa"),
    "auto_map": ({"AutoModelForCausalLM": "modeling_x.XForCausalLM"},),
    "bos_token_id": (3,),
    "decoder_sparse_step": (2, 1),
    "dtype": ("bfloat16", "float32"),
    "dual_chunk_attention_config": ({"chunk_size": 16, "local_size": 8, "original_max_position_embeddings": 24},),
    "eos_token_id": ([1, 2],),
    "experts_implementation": ("eager",),
    "head_dim": (None, 8, 32),
    "hidden_act": ("swish", "gelu", "relu"),
    "id2label": ({"0": "no", "1": "yes"},),
    "is_causal": (False, None, True),
    "kv_sharing_modes": (["store", "reuse"],),
    "label2id": ({"no": 0, "yes": 1},),
    "layer_types": _LAYER_TYPES,
    "max_position_embeddings": (24, 96, 0),
    "max_window_layers": (0,),
    "mlp_only_layers": ([0], []),
    "model_type": (),  # another family
    "num_attention_heads": (3, 12),
    "num_experts": (4, 6),
    "num_experts_per_tok": (1, 3, 5),
    "num_hidden_layers": (1, 3),
    "num_key_value_heads": (1, 3, 6, None),
    "num_local_experts": (4, 6),
    "original_max_position_embeddings": (24, 64),
    "output_attentions": (True,),
    "pad_token_id": (400, -1, 999),
    "partial_rotary_factor": (0.5, 1.0),
    "per_layer_config": ({"0": {"rms_norm_eps": 0.1}}, {"1": {"sliding_window": 4}}, {"1": {"head_dim": 8}}),
    "problem_type": ("regression",),
    "quantization_config": ({"quant_method": "fp8"}, None),
    "return_dict": (False,),
    "rms_norm_eps": (1e-2, 1e-6, 0.0),
    "rope_parameters": ROPES,
    "rope_scaling": ({"type": "linear", "factor": 2.0}, {"type": "yarn", "factor": 4.0, **_ORIGINAL}),
    "rope_theta": (1e3, 5e5),
    "sliding_window": _WINDOWS,
    "tie_word_embeddings": (True,),
    "torch_dtype": ("float16",),
    "transformers_version": ("4.30.0",),
    "transformers_weights": ("other.safetensors",),
    "use_sliding_window": (True, False),
    "vocab_size": (389, 402),
}

#: Seen in published configs, or read by what all classes of transformers share, and declared by few of ours or none.
_SEEN = (
    *("add_cross_attention", "attention_bias", "attention_chunk_size", "attention_multiplier", "attn_implementation"),
    *("auto_map", "chunk_size_feed_forward", "dual_chunk_attention_config", "embd_pdrop", "embedding_multiplier"),
    *("experts_implementation", "final_logit_softcapping", "full_attn_mod", "head_dim", "hidden_activation"),
    *("interpolate_factor", "is_causal", "is_decoder", "kv_sharing_modes", "layer_types", "lm_head_bias"),
    *("logit_scale", "logits_scaling", "max_sequence_length", "max_window_layers", "mlp_bias", "n_shared_experts"),
    *("no_rope_layers", "norm_topk_prob", "num_experts", "num_nextn_predict_layers"),
    *("original_max_position_embeddings", "output_attentions", "partial_rotary_factor", "per_layer_config"),
    *("pretraining_tp", "pruned_heads", "qk_layernorm", "qkv_bias", "quantization_config", "query_pre_attn_scalar"),
    *("resid_pdrop", "residual_multiplier", "rope_interleaved", "rope_parameters", "router_jitter_noise"),
    *("routed_scaling_factor", "scale_emb", "shared_expert_intermediate_size", "sliding_window"),
    *("sliding_window_pattern", "temperature", "tie_last_hidden_states", "torch_dtype", "transformers_weights"),
    *("use_mrope", "use_qk_norm", "use_sliding_window"),
)

#: Keys that decide something together only.
_SLIDING = {"use_sliding_window": True, "max_window_layers": 1}
COMBINED: tuple[dict[str, Any], ...] = (
    *({**_SLIDING, "sliding_window": window} for window in _WINDOWS),
    {**_SLIDING, "max_window_layers": 0, "sliding_window": 24},
    {**_SLIDING, "max_window_layers": 2, "sliding_window": 24},
    *({"layer_types": types, "sliding_window": 24} for types in _LAYER_TYPES),
    *({**_SLIDING, "layer_types": types, "sliding_window": 24} for types in _LAYER_TYPES[:4]),
    {"layer_types": _LAYER_TYPES[2], "sliding_window": 48},
    {"sliding_window": 24, "max_position_embeddings": 24},
    {"sliding_window": 24, "is_causal": False},
    {"rope_scaling": {"type": "yarn", "factor": 4.0}, "original_max_position_embeddings": 24},
    {"rope_scaling": {"type": "linear", "factor": 4.0}, "rope_theta": 5e5, "rope_parameters": {"rope_theta": 1e2}},
    {"rope_parameters": {"rope_type": "default", "rope_theta": 1e3}, "rope_theta": 5e5},
)


def made(folder: Path, family: str) -> Path:
    """Write a checkpoint of two layers, with its config as models are published."""
    make = checkpoint_with_a_common_direction if FAMILIES[family].experts else tiny_checkpoint
    keys: dict[str, Any] = {"attention_bias": True} if FAMILIES[family].bias_key else {}
    if family == "ministral":
        keys["sliding_window"] = CONTEXT
    make(folder, family=_made_as(family), max_position_embeddings=CONTEXT, **keys)
    config = read_config(folder)
    config |= {"rope_theta": config.pop("rope_parameters")["rope_theta"], "rope_scaling": None}
    if family == "mimo":
        config |= {"model_type": "mimo", "architectures": ["MiMoForCausalLM"]}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def _made_as(family: str) -> str:
    return "qwen2" if family == "mimo" else family


def declared(family: str) -> dict[str, Any]:
    """Return the keys that the class of a family declares, with their defaults."""
    return CONFIGS[_made_as(family)][0]().to_dict()


def single_changes(family: str, config: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Every key with every other value."""
    present = declared(family) | config
    for key in sorted({*present, *_SEEN}):
        for value in VALUES.get(key, _guesses(present.get(key))):
            # 1 is no change of True, and yet another value in JSON.
            if key not in config or json.dumps(config[key]) != json.dumps(value):
                yield {key: value}


def _guesses(value: Any) -> tuple[Any, ...]:
    """Return other values of the kind."""
    if isinstance(value, bool):
        return (not value,)
    if isinstance(value, int):
        return (value + 1, 2 * value)
    if isinstance(value, float):
        return (2 * value + 0.5,)
    return ("x",) if isinstance(value, str) else (True, 2)
