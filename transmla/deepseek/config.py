"""The target's config.json: a plain DeepSeek-V3 model in the keys that every engine reads."""

import copy
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from transformers import DeepseekV3Config, LlamaConfig, PretrainedConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

import transmla
from transmla.arch.experts import Mixture
from transmla.deepseek.neutral_norm import NeutralNorm
from transmla.deepseek.sizes import MLASizes
from transmla.deepseek.target_spec import TargetSpec
from transmla.linalg.rotary import rope_frequencies

_ROUTING: dict[str, Any] = {
    "moe_layer_freq": 1,
    "n_group": 1,
    "topk_group": 1,
    "topk_method": "noaux_tc",
    "scoring_func": "sigmoid",
    "norm_topk_prob": True,
    "routed_scaling_factor": 1.0,
    "num_nextn_predict_layers": 0,
}
_KEPT = ("bos_token_id", "eos_token_id", "pad_token_id", "initializer_range", "attention_dropout", "use_cache")


def target_config(
    source: PretrainedConfig,
    spec: TargetSpec,
    sizes: MLASizes,
    norm: NeutralNorm,
    *,
    dtype: torch.dtype,
    exact: bool,
) -> dict[str, Any]:
    """Write the config of the converted model.

    Args:
        source: config of the source model, for the token ids.
        spec: its attention.
        sizes: sizes of the latent attention.
        norm: how the latent norm is neutralized; its eps is every norm's.
        dtype: storage type.
        exact: give every rotary slot the frequency of the source's pair.
    """
    return {
        "architectures": ["DeepseekV3ForCausalLM"],
        "model_type": "deepseek_v3",
        "vocab_size": spec.vocab_size,
        "hidden_size": spec.hidden_size,
        "intermediate_size": spec.intermediate_size,
        "num_hidden_layers": spec.num_hidden_layers,
        "num_attention_heads": spec.num_attention_heads,
        "num_key_value_heads": spec.num_attention_heads,
        "q_lora_rank": sizes.q_lora_rank,
        "kv_lora_rank": sizes.kv_lora_rank,
        "qk_rope_head_dim": sizes.qk_rope_head_dim,
        "qk_nope_head_dim": sizes.qk_nope_head_dim,
        "v_head_dim": sizes.v_head_dim,
        "hidden_act": "silu",
        "rms_norm_eps": norm.eps,
        "attention_bias": spec.biased,
        "max_position_embeddings": spec.max_position_embeddings,
        "rope_interleave": True,
        # To the power of whatever, 1 is 1: in exact mode the factors alone make the frequencies.
        "rope_theta": 1.0 if exact else spec.rope_theta,
        "rope_scaling": _own_grid(spec) if exact else _scaled_grid(spec) if spec.keep_scaling else _plain_grid(spec),
        **_experts(spec, sizes),
        **_ROUTING,
        "tie_word_embeddings": False,
        **{key: value for key in _KEPT if (value := getattr(source, key, None)) is not None},
        "torch_dtype": str(dtype).removeprefix("torch."),
        "transmla_version": transmla.__version__,
    }


def _experts(spec: TargetSpec, sizes: MLASizes) -> dict[str, Any]:
    mixture = spec.mixture
    if mixture is None:
        # No dense layer instantiates an expert, but strict configs and converters want the keys.
        mixture, shared = Mixture(num_experts=8, num_experts_per_tok=2, intermediate_size=512), 1
    else:
        shared = sizes.n_shared_experts
    return {
        "first_k_dense_replace": 0 if spec.mixture else spec.num_hidden_layers,
        "n_routed_experts": mixture.num_experts,
        "n_shared_experts": shared,
        "num_experts_per_tok": mixture.num_experts_per_tok,
        "moe_intermediate_size": mixture.intermediate_size,
    }


def load_target(config: dict[str, Any]) -> DeepseekV3Config:
    """Read the config as stock transformers does, which standardizes the dictionaries it is given."""
    return DeepseekV3Config.from_dict(copy.deepcopy(config))


def target_frequencies(spec: TargetSpec, sizes: MLASizes) -> Float[Tensor, " slot"]:
    """Return the frequency of each rotary slot under :func:`target_config`, where it is not exact."""
    if not spec.keep_scaling:
        return rope_frequencies(spec.rope_theta, sizes.qk_rope_head_dim)
    # Whatever the model, they follow from the parameters and the number of slots.
    config = LlamaConfig(
        head_dim=sizes.qk_rope_head_dim,
        max_position_embeddings=spec.max_position_embeddings,
        rope_parameters={"rope_theta": spec.rope_theta, **spec.rope_scaling},
    )
    frequencies, _ = ROPE_INIT_FUNCTIONS[spec.rope_type](config, torch.device("cpu"))
    return frequencies


def _scaled_grid(spec: TargetSpec) -> dict[str, Any]:
    """Scale the slots as the source scales its pairs."""
    return {"type": spec.rope_type, **spec.rope_scaling}


def _plain_grid(spec: TargetSpec) -> dict[str, Any]:
    """Write plain RoPE as YaRN with factor 1: vLLM turns every other spelling into something else."""
    return {
        "type": "yarn",
        "rope_type": "yarn",
        "factor": 1.0,
        "original_max_position_embeddings": spec.max_position_embeddings,
        "beta_fast": 32,
        "beta_slow": 1,
        "mscale": 1.0,
        "mscale_all_dim": 1.0,
    }


def _own_grid(spec: TargetSpec) -> dict[str, Any]:
    """Give every slot its own frequency, 1 / factor, for plain RoPE to the last bit of the source's.

    See docs/concepts/checkpoint-format.md, "RoPE in exact mode".

    A rounding error in a frequency grows with the position: one of 3e-7 turns a fast pair by 0.01 at position 32,768.
    """
    factors = (1 / spec.frequencies.repeat(spec.num_key_value_heads)).tolist()
    return {
        "type": "longrope",
        "rope_type": "longrope",
        "factor": 1.0,
        "attention_factor": 1.0,
        "original_max_position_embeddings": spec.max_position_embeddings,
        "short_factor": factors,
        "long_factor": factors,
    }
