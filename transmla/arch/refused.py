"""Rows of data for models that are not converted, and why: read off the code that computes each of them.

A row is added by adding a line. Two kinds: what DeepSeek-V3 cannot hold, and what it could but nobody has written.
"""

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

from transmla.errors import UnsupportedModelError

_LAYER_NORM = "its norms subtract the mean (DeepSeek-V3 has RMSNorm only)"
_ALIBI = f"it has ALiBi in the place of RoPE, and {_LAYER_NORM}"
_LEARNT = f"it has learnt positions in the place of RoPE, and {_LAYER_NORM}"
_PARTIAL = "only part of each head is rotated (partial RoPE)"
_POST_NORM = "it has norms after attention and MLP, before they are added to the residual stream"
_ONLY_POST_NORM = f"{_POST_NORM}, and none in front"
_WIDE_NORM = "its norm on queries and keys goes over all heads together"
_CAPPED = "its attention logits are capped by a tanh"
_GELU = "its MLP computes GELU, and DeepSeek-V3 engines compute SwiGLU with silu only"
_RELU2 = "its MLP computes squared ReLU without a gate, and DeepSeek-V3 engines compute SwiGLU with silu only"
_SOME_WINDOWS = "most of its layers have a sliding window"
_NO_ROPE = "every fourth layer has no RoPE, and in DeepSeek-V3 all layers have the same"
_STATES = "most of its layers are state-space or linear ones and have no attention"
_SIDE_BY_SIDE = f"attention and MLP run side by side in it, {_LAYER_NORM}"
_SHARES_OF_ALL = (
    "its experts are weighed by their share among all of them, where DeepSeek-V3's sigmoid can only give the share "
    "among the chosen ones"
)
_SINK = "its softmax has a learnt sink for every head, which no DeepSeek-V3 engine computes"
_GRANITE_MIXTURE = (
    "it is a dialect of Mixtral: Granite's four scalars (attention_multiplier, embedding_multiplier, logits_scaling, "
    "residual_multiplier), and experts in names and shapes of their own (input_linear, output_linear)"
)
_MINISTRAL3 = "it is Mistral with YaRN and a query scale by position"
_NOT_YET = "it could be held, and this version does not read it yet"
LATENT_ALREADY = "it has latent attention already"
_ENCODER = "it is an encoder, which attends both ways and predicts no next token"
_ENCODER_DECODER = "it is an encoder with a decoder, and DeepSeek-V3 is a decoder alone"

#: What DeepSeek-V3 cannot hold, by model_type; completes "This … model cannot be converted: ".
REFUSED: Mapping[str, str] = MappingProxyType(
    {
        "gemma": _GELU,
        "gemma2": f"{_CAPPED}, {_POST_NORM}, and every other layer has a sliding window",
        "gemma3": f"{_POST_NORM}, its MLP computes GELU, and {_SOME_WINDOWS}",
        "gemma3_text": f"{_POST_NORM}, its MLP computes GELU, and {_SOME_WINDOWS}",
        "gemma3n": f"{_POST_NORM}, its MLP computes GELU, {_SOME_WINDOWS}, and layers share keys and values",
        "gemma3n_text": f"{_POST_NORM}, its MLP computes GELU, {_SOME_WINDOWS}, and layers share keys and values",
        "gemma4": f"{_POST_NORM}, its MLP computes GELU, and {_SOME_WINDOWS}",
        "gemma4_text": f"{_POST_NORM}, its MLP computes GELU, and {_SOME_WINDOWS}",
        "vaultgemma": f"{_CAPPED}, and {_GELU}",
        "recurrent_gemma": _STATES,
        "gpt_oss": _SINK,
        "granite_swa": f"{_SINK}, and {_SOME_WINDOWS}",
        "granitemoe_swa": f"{_SINK}, and {_SOME_WINDOWS}",
        "mimo_v2_flash": f"{_SINK}, and {_SOME_WINDOWS}",
        "qwen": (
            "beyond seq_length its queries are multiplied by a logarithm of the position (use_logn_attn) and the base "
            "of its RoPE grows with the text (use_dynamic_ntk)"
        ),
        "qwen2_moe": "its shared expert has a gate of its own, and DeepSeek-V3 adds shared experts as they are",
        "qwen3_next": "most of its layers have linear attention",
        "qwen3_5": "most of its layers have linear attention",
        "qwen3_5_text": "most of its layers have linear attention",
        "qwen3_5_moe": "most of its layers have linear attention",
        "qwen3_5_moe_text": "most of its layers have linear attention",
        "cohere": _SIDE_BY_SIDE,
        "cohere2": f"{_SIDE_BY_SIDE}, and {_SOME_WINDOWS}",
        "cohere2_moe": f"{_SIDE_BY_SIDE}, and {_SOME_WINDOWS}",
        "olmo": f"{_LAYER_NORM} and have no weights",
        "olmo2": f"{_ONLY_POST_NORM}, and {_WIDE_NORM}",
        "olmo3": f"{_ONLY_POST_NORM}, {_WIDE_NORM}, and {_SOME_WINDOWS}",
        "olmo_hybrid": _STATES,
        "olmoe": f"{_WIDE_NORM}, and {_SHARES_OF_ALL}",
        "flex_olmo": f"{_ONLY_POST_NORM}, and {_WIDE_NORM}",
        "exaone4": f"{_ONLY_POST_NORM}, {_SOME_WINDOWS}, and those without a window have no RoPE",
        "exaone_moe": f"{_SOME_WINDOWS}, and those without a window have no RoPE",
        "smollm3": _NO_ROPE,
        "llama4": _NO_ROPE,
        "llama4_text": _NO_ROPE,
        "cwm": f"{_SOME_WINDOWS}, and DeepSeek-V3 has none",
        "afmoe": f"{_POST_NORM}, its attention has a gate on its output, and {_SOME_WINDOWS}",
        "glm": _PARTIAL,
        "glm4": f"{_PARTIAL}, and {_POST_NORM}",
        "glm4_moe": _PARTIAL,
        "glm4v_text": f"{_PARTIAL}, and {_POST_NORM}",
        "glm4v_moe_text": _PARTIAL,
        "chatglm": "only half of each head is rotated (partial RoPE)",
        "minimax_m2": f"{_PARTIAL}, and {_WIDE_NORM}",
        "minimax": "most of its layers have linear attention",
        "minimax_text_01": "most of its layers have linear attention",
        "minimax_m1": "most of its layers have linear attention",
        "nemotron": f"{_LAYER_NORM}, {_RELU2}, and {_PARTIAL}",
        "nemotron-nas": (
            "its layers differ: some have no attention or a linear map in its place, and heads and MLPs have sizes of "
            "their own (block_configs)"
        ),
        "deci": "its layers differ in the number of key/value heads",
        "nemotron_h": _STATES,
        "arcee": _RELU2,
        "jais2": f"{_LAYER_NORM}, and {_RELU2}",
        "nanochat": f"{_RELU2}, its norm on queries and keys comes after RoPE, and its logits are capped by a tanh",
        "apertus": "its MLP computes xIELU without a gate, and DeepSeek-V3 engines compute SwiGLU with silu only",
        "bitnet": f"it has norms inside attention and MLP, and {_RELU2}",
        "hunyuan_v1_dense": "its norm on queries and keys comes after RoPE, where no linear map stands for it",
        "hunyuan_v1_moe": "its norm on queries and keys comes after RoPE, where no linear map stands for it",
        "hunyuan": "its norm on queries and keys comes after RoPE, where no linear map stands for it",
        "hyperclovax": _POST_NORM,
        "diffllama": "its attention is the difference of two softmaxes",
        "doge": "its attention adds a learnt mask that depends on the values",
        "dbrx": f"{_LAYER_NORM}, and its queries, keys and values may be clipped (clip_qkv)",
        "deepseek": _SHARES_OF_ALL,
        "phi": f"{_SIDE_BY_SIDE}, its MLP computes GELU, and {_PARTIAL}",
        "phi-msft": f"{_SIDE_BY_SIDE}, its MLP computes GELU, and {_PARTIAL}",
        "phi3small": f"its MLP computes GeGELU, {_LAYER_NORM}, and every other layer has block-sparse attention",
        "phimoe": f"{_LAYER_NORM}, its router weighs each expert by itself (sparse mixer), and its head has a bias",
        "stablelm": f"{_LAYER_NORM}, and {_PARTIAL}",
        "stablelm_epoch": f"{_LAYER_NORM}, and {_PARTIAL}",
        "starcoder2": f"{_LAYER_NORM}, its MLP computes GELU without a gate, and its layers have a sliding window",
        "persimmon": f"{_LAYER_NORM}, {_RELU2}, and {_PARTIAL}",
        "orion": _LAYER_NORM,
        "jetmoe": "its attention is a mixture of experts, too",
        "ernie4_5_moe": (
            "its experts are chosen by their share among all of them with a bias added to it, which DeepSeek-V3's "
            "sigmoid cannot repeat"
        ),
        "granitemoe": _GRANITE_MIXTURE,
        "granitemoeshared": _GRANITE_MIXTURE,
        "granitemoehybrid": _STATES,
        "lfm2": "most of its layers are short convolutions, and have no attention",
        "lfm2_moe": "most of its layers are short convolutions, and have no attention",
        "jamba": _STATES,
        "bamba": _STATES,
        "zamba": _STATES,
        "zamba2": _STATES,
        "falcon_h1": "a state-space mixer runs beside attention in every layer of it",
        "kimi_linear": _STATES,
        "mamba": "it has no attention",
        "mamba2": "it has no attention",
        "falcon_mamba": "it has no attention",
        "rwkv": "it has no attention",
        "xlstm": "it has no attention",
        "mpt": _ALIBI,
        "bloom": _ALIBI,
        "jais": _ALIBI,
        "falcon": _LAYER_NORM,
        "RefinedWeb": _LAYER_NORM,
        "RefinedWebModel": _LAYER_NORM,
        "gpt_neox": _LAYER_NORM,
        "gptj": _SIDE_BY_SIDE,
        "codegen": _SIDE_BY_SIDE,
        "gpt2": _LEARNT,
        "gpt_neo": _LEARNT,
        "gpt_bigcode": _LEARNT,
        "opt": _LEARNT,
        "deepseek_v2": LATENT_ALREADY,
        "deepseek_v3": LATENT_ALREADY,
        "bert": _ENCODER,
        "roberta": _ENCODER,
        "xlm-roberta": _ENCODER,
        "modernbert": _ENCODER,
    }
)

_LLAMA = f"it is Llama {{}}: {_NOT_YET}"
_SCALARS = "it is Llama with {}, which can be folded into the weights, and this version does not do so yet"

#: What DeepSeek-V3 could hold and no row of the family table describes; completes "… is not converted yet: ".
LATER: Mapping[str, str] = MappingProxyType(
    {
        "baichuan": _LLAMA.format(
            "with queries, keys and values in one weight (W_pack) and a head that may be normalised"
        ),
        "internlm": _LLAMA.format("with biases in its attention"),
        "internlm2": _LLAMA.format("with other names, and queries, keys and values in one weight (wqkv)"),
        "internlm3": _LLAMA.format("with other names for its biases"),
        "xverse": _LLAMA.format("under another name"),
        "Yi": _LLAMA.format("with other names for its norms"),
        "aquila": _LLAMA.format("under another name"),
        "iquestcoder": _LLAMA.format("under another name"),
        "exaone": _LLAMA.format("with other names"),
        "ernie4_5": _LLAMA.format("with its RoPE on neighboring numbers"),
        "helium": _LLAMA.format("with its RoPE on neighboring numbers"),
        "seed_oss": _LLAMA.format("with biases on queries, keys and values"),
        "solar_open": f"it is a mixture with DeepSeek-V3's own routing: {_NOT_YET}",
        "ministral3": f"{_MINISTRAL3}, which is 1 within original_max_position_embeddings: there {_NOT_YET}",
        "granite": _SCALARS.format(
            "four scalars (attention_multiplier, embedding_multiplier, logits_scaling, residual_multiplier)"
        ),
        "minicpm": _SCALARS.format("scalars (scale_emb, scale_depth, dim_model_base)"),
    }
)


class _Variant(NamedTuple):
    """A model type whose row depends on the config; the first that applies wins over the tables above."""

    model_type: str
    applies: Callable[[Mapping[str, Any]], bool]
    reason: str
    later: bool = False


def _is_all(raw: Mapping[str, Any], key: str, value: str) -> bool:
    kinds = raw.get(key)
    return isinstance(kinds, list) and bool(kinds) and all(kind == value for kind in kinds)


def _query_scale(raw: Mapping[str, Any]) -> Any:
    rope = raw.get("rope_parameters")
    return rope.get("llama_4_scaling_beta") if isinstance(rope, Mapping) else None


_VARIANTS = (
    # Its larger model is another one under the same name.
    _Variant("baichuan", lambda raw: raw.get("hidden_size") != 4096, "it has ALiBi in the place of RoPE"),
    _Variant(
        "chatglm", lambda raw: bool(raw.get("position_encoding_2d")), f"its RoPE is in two dimensions, {_LAYER_NORM}"
    ),
    _Variant(
        "ministral3",
        lambda raw: _query_scale(raw) == 0,
        f"{_MINISTRAL3}, which is always 1 as llama_4_scaling_beta is 0: {_NOT_YET}",
        later=True,
    ),
    _Variant(
        "deepseek",
        lambda raw: raw.get("norm_topk_prob") is True,
        f"its experts are weighed by their share among the chosen ones: {_NOT_YET}",
        later=True,
    ),
    _Variant(
        "qwen",
        lambda raw: raw.get("use_logn_attn") is False and raw.get("use_dynamic_ntk") is False,
        _LLAMA.format("with other names, and queries, keys and values in one biased weight (c_attn)"),
        later=True,
    ),
    _Variant(
        "granitemoehybrid",
        lambda raw: _is_all(raw, "layer_types", "attention") and not raw.get("num_local_experts"),
        LATER["granite"],
        later=True,
    ),
)


class Refusal(NamedTuple):
    """Why a model type is not converted, and whether DeepSeek-V3 could hold it all the same."""

    reason: str
    later: bool


def find_refusal(raw: Mapping[str, Any]) -> Refusal | None:
    """Return why a model whose config.json holds ``raw`` is not converted, if anything here says so."""
    model_type = raw.get("model_type")
    if raw.get("kv_lora_rank"):
        return Refusal(f"{LATENT_ALREADY} (config.json: kv_lora_rank = {raw['kv_lora_rank']!r:.20})", later=False)
    if not isinstance(model_type, str):
        return None
    for variant in _VARIANTS:
        if variant.model_type == model_type and variant.applies(raw):
            return Refusal(variant.reason, variant.later)
    if model_type in LATER:
        return Refusal(LATER[model_type], later=True)
    if model_type in REFUSED:
        return Refusal(REFUSED[model_type], later=False)
    return Refusal(_ENCODER_DECODER, later=False) if raw.get("is_encoder_decoder") is True else None


def check_not_refused(raw: Mapping[str, Any]) -> None:
    """Refuse a model that a row is against.

    Raises:
        UnsupportedModelError: the reason that stands whatever is changed, and what else is in the way.
    """
    if (refusal := find_refusal(raw)) is None:
        return
    verdict = "is not converted yet" if refusal.later else "cannot be converted"
    model_type = raw.get("model_type")
    kind = f"{model_type} model" if isinstance(model_type, str) else "model"
    raise UnsupportedModelError(f"This {kind} {verdict}: {refusal.reason}.{also_quantized(raw)}")


def also_quantized(raw: Mapping[str, Any]) -> str:
    """Say that the weights are quantised besides, where a config says so."""
    for key in ("quantization_config", "compression_config", "quantization"):
        if isinstance(found := raw.get(key), Mapping) and found:
            method = found.get("quant_method") or f"{found.get('bits', 'few')} bits"
            return f" Its weights are quantised besides (config.json: {key}, {method!s:.40})."
    return ""
