"""One row of data per model family: where its weights are, and what the target cannot hold.

A family is added by adding a row. Nothing else in the package asks for a model's name.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

from transmla.arch.experts import ExpertNames


@dataclass(frozen=True)
class Requirement:
    """A config key that must have one of a few values, and why.

    Attributes:
        key: key of config.json; where it is absent, transformers' default counts, and a key it does not know passes.
        allowed: values that pass.
        reason: completes the sentence "… cannot be converted: ".
    """

    key: str
    allowed: tuple[object, ...]
    reason: str


@dataclass(frozen=True)
class Family:
    """How one ``model_type`` names its parts.

    Attributes:
        title: name for people.
        layers: prefix of the decoder layers, before ``.{index}.``.
        attention: prefix inside a layer of the modules ``q_proj, k_proj, v_proj, o_proj``.
        projections: modules of attention whose outputs are the queries, keys and values before RoPE.
        head_norms: norms on each head of a projection's output, by the projection (QK-norm).
        input_norm: name inside a layer of the norm weight in front of attention.
        mlp_norm: module inside a layer of the norm in front of the MLP.
        residual_writers: endings of the names of the weights whose output is added to the residual stream.
        computed_by: ``model_type`` of the class of transformers that computes the model; its own unless told.
        fused: weights that are stored as one, one below the other, and their parts in that class; inside a layer.
        experts: how a mixture of experts is stored, where the MLP is one.
        expert_size: key of config.json for the intermediate size of an expert.
        biased: projections of attention that have biases.
        bias_key: key of config.json that says whether they do; where it is ``None`` they always do.
        embedding, head: names of the token embedding and of the output head.
        requirements: what must hold for the target to be able to hold the model.
    """

    title: str
    layers: str = "model.layers"
    attention: str = "self_attn"
    projections: tuple[str, str, str] = ("q_proj", "k_proj", "v_proj")
    head_norms: Mapping[str, str] = field(default_factory=lambda: MappingProxyType({}))
    input_norm: str = "input_layernorm.weight"
    mlp_norm: str = "post_attention_layernorm"
    residual_writers: tuple[str, ...] = ("o_proj.weight", "down_proj.weight")
    computed_by: str | None = None
    fused: Mapping[str, tuple[str, ...]] = field(default_factory=lambda: MappingProxyType({}))
    experts: ExpertNames | None = None
    expert_size: str = "moe_intermediate_size"
    biased: tuple[str, ...] = ()
    bias_key: str | None = None
    embedding: str = "model.embed_tokens.weight"
    head: str = "lm_head.weight"
    requirements: tuple[Requirement, ...] = ()


# The last four are read by what all classes share: masks, caches and the loading of weights.
_COMMON = (
    Requirement("hidden_act", ("silu", "swish"), "DeepSeek-V3 engines compute SwiGLU with silu only"),
    Requirement("mlp_bias", (False, None), "DeepSeek-V3 has no biases in its MLP"),
    Requirement("quantization_config", (None,), "its weights are quantised; convert the full-precision checkpoint"),
    # transformers takes null for false.
    Requirement("is_causal", (True,), "its tokens attend to those after them, too, and DeepSeek-V3 is causal"),
    Requirement("kv_sharing_modes", (None,), "its layers share a cache, and in DeepSeek-V3 each has its own"),
    Requirement("return_dict", (True,), "transformers' own classes fail where it is not true; remove it"),
    Requirement("transformers_weights", (None,), "its weights are in a file of another name than model.safetensors"),
)

_NO_BIASES = Requirement("attention_bias", (False, None), "in transformers its attention has no biases")

_QWEN3_ATTENTION: dict[str, Any] = {
    "projections": ("q_norm", "k_norm", "v_proj"),
    "head_norms": MappingProxyType({"q_proj": "q_norm", "k_proj": "k_norm"}),
    "biased": ("q_proj", "k_proj", "v_proj", "o_proj"),
    "bias_key": "attention_bias",
}

FAMILIES: Mapping[str, Family] = MappingProxyType(
    {
        "llama": Family(
            "Llama",
            biased=("q_proj", "k_proj", "v_proj", "o_proj"),
            bias_key="attention_bias",
            requirements=_COMMON,
        ),
        "mistral": Family("Mistral", requirements=(*_COMMON, _NO_BIASES)),
        "ministral": Family("Ministral", requirements=(*_COMMON, _NO_BIASES)),
        "qwen2": Family("Qwen2", biased=("q_proj", "k_proj", "v_proj"), requirements=_COMMON),
        # Its heads for more than the next token are beside the model, and there is nothing to hold them.
        "mimo": Family(
            "MiMo",
            computed_by="qwen2",
            biased=("q_proj", "k_proj", "v_proj"),
            requirements=_COMMON,
        ),
        "phi3": Family(
            "Phi-3",
            computed_by="llama",
            fused=MappingProxyType(
                {
                    "self_attn.qkv_proj.weight": tuple(f"self_attn.{kind}_proj.weight" for kind in "qkv"),
                    "mlp.gate_up_proj.weight": ("mlp.gate_proj.weight", "mlp.up_proj.weight"),
                }
            ),
            requirements=(*_COMMON, _NO_BIASES),
        ),
        "qwen3": Family("Qwen3", **_QWEN3_ATTENTION, requirements=_COMMON),
        "mixtral": Family(
            "Mixtral",
            experts=ExpertNames(
                router="block_sparse_moe.gate.weight",
                gate="block_sparse_moe.experts.{}.w1.weight",
                up="block_sparse_moe.experts.{}.w3.weight",
                down="block_sparse_moe.experts.{}.w2.weight",
            ),
            expert_size="intermediate_size",
            requirements=(*_COMMON, _NO_BIASES),
        ),
        "qwen3_moe": Family(
            "Qwen3-MoE",
            **_QWEN3_ATTENTION,
            experts=ExpertNames(),
            requirements=(
                *_COMMON,
                Requirement(
                    "norm_topk_prob",
                    (True,),
                    "its experts are weighed by their share among all of them, where DeepSeek-V3's sigmoid can only "
                    "give the share among the chosen ones",
                ),
                Requirement("decoder_sparse_step", (1,), "dense layers between mixtures have no place in DeepSeek-V3"),
                Requirement("mlp_only_layers", ([],), "dense layers between mixtures have no place in DeepSeek-V3"),
            ),
        ),
    }
)
