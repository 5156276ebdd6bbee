"""One row of data per model family: where its weights are, and what the target cannot hold.

A family is added by adding a row. Nothing else in the package asks for a model's name.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType


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
        residual_writers: suffixes inside a layer of the weights whose output is added to the residual stream.
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
    residual_writers: tuple[str, ...] = ("self_attn.o_proj.weight", "mlp.down_proj.weight")
    biased: tuple[str, ...] = ()
    bias_key: str | None = None
    embedding: str = "model.embed_tokens.weight"
    head: str = "lm_head.weight"
    requirements: tuple[Requirement, ...] = ()


_COMMON = (
    Requirement("hidden_act", ("silu",), "DeepSeek-V3 engines compute SwiGLU with silu only"),
    Requirement("mlp_bias", (False, None), "DeepSeek-V3 has no biases in its MLP"),
    Requirement("quantization_config", (None,), "its weights are quantised; convert the full-precision checkpoint"),
)

_NO_SLIDING_WINDOW = Requirement("sliding_window", (None,), "DeepSeek-V3 has no sliding-window attention")

FAMILIES: Mapping[str, Family] = MappingProxyType(
    {
        "llama": Family(
            "Llama",
            biased=("q_proj", "k_proj", "v_proj", "o_proj"),
            bias_key="attention_bias",
            requirements=_COMMON,
        ),
        "mistral": Family(
            "Mistral",
            requirements=(
                *_COMMON,
                _NO_SLIDING_WINDOW,
                Requirement("attention_bias", (False, None), "transformers' Mistral has no biases in its attention"),
            ),
        ),
        "qwen2": Family("Qwen2", biased=("q_proj", "k_proj", "v_proj"), requirements=(*_COMMON, _NO_SLIDING_WINDOW)),
        "qwen3": Family(
            "Qwen3",
            projections=("q_norm", "k_norm", "v_proj"),
            head_norms=MappingProxyType({"q_proj": "q_norm", "k_proj": "k_norm"}),
            biased=("q_proj", "k_proj", "v_proj", "o_proj"),
            bias_key="attention_bias",
            requirements=(*_COMMON, _NO_SLIDING_WINDOW),
        ),
    }
)
