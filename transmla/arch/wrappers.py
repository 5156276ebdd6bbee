"""Models around a language model: it reads pictures or sound besides, and its text part alone could be a source."""

import json
import tempfile
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal, NamedTuple

from transformers import CONFIG_MAPPING

from transmla.arch.families import FAMILIES
from transmla.arch.refused import also_quantized, find_refusal
from transmla.arch.spec import describe, load_config
from transmla.errors import TransMLAError, UnsupportedModelError

# Keys under which the config of the text part lies; one may lie in another.
_TEXT = (
    *("text_config", "llm_config", "language_config", "thinker_config", "language_model_config", "lm_config"),
    *("text_model_config", "llm_model_config", "decoder_config"),
)
# Keys that say that a config whose text part lies in the open is of more than text.
_SENSES = (
    *("vision_config", "mm_vision_tower", "vision_tower", "img_processor", "visual", "visual_config", "vision_model"),
    *("audio_config", "audio_processor", "audio_encoder_config", "mm_audio_tower", "speech_config", "sound_config"),
)
# What computes the text of a part that has a name of its own: on text alone it is that family's model.
_COMPUTED_AS: Mapping[str, str] = MappingProxyType(
    {
        **dict.fromkeys(("qwen2_vl", "qwen2_vl_text", "qwen2_5_vl", "qwen2_5_vl_text", "qwen2_5_omni_text"), "qwen2"),
        **dict.fromkeys(("qwen3_vl_text", "qwen3_vl"), "qwen3"),
        **dict.fromkeys(("qwen3_vl_moe_text", "qwen3_omni_moe_text", "qwen3_vl_moe"), "qwen3_moe"),
        # Its layers of cross-attention pass where there is no picture.
        "mllama_text_model": "llama",
        "emu3_text_model": "llama",
        **dict.fromkeys(("phi3_v", "phi4mm", "phi4_multimodal"), "phi3"),
    }
)
# Parts of names by which a text part that nothing names is known; the first that fits.
_STEMS = ("mixtral", "mistral", "qwen3", "qwen2", "qwen", "phi3", "gemma3", "gemma2", "gemma", "internlm2", "llama")


class _TextPart(NamedTuple):
    where: str
    raw: dict[str, Any]


class _Verdict(NamedTuple):
    """Whether a text part alone could be converted, now or ``later``, and what is in the way."""

    kind: Literal["convertible", "later", "refused", "unknown"]
    reason: str = ""


def check_no_wrapper(raw: Mapping[str, Any]) -> None:
    """Refuse a model around a language model.

    Raises:
        UnsupportedModelError: what its text part is, and whether that could be converted.
    """
    part = _find_text_part(raw)
    if part is None:
        return
    named, model_type = raw.get("model_type"), part.raw.get("model_type")
    name = f"This {named} model" if isinstance(named, str) else "This model"
    quantized = also_quantized(raw) or also_quantized(part.raw)
    if not isinstance(model_type, str):
        raise UnsupportedModelError(
            f"{name} is a wrapper around a text part ({part.where}) whose model_type config.json does not name, so "
            f"that nothing is known of it; only whole language models are converted.{quantized}"
        )
    family = FAMILIES.get(_COMPUTED_AS.get(model_type, ""))
    text = f"{model_type} ({part.where}{f', on text alone {family.title}' if family else ''})"
    verdict = _judge(part.raw, model_type)
    sentence = {
        "convertible": f"around a text part that is convertible in itself: {text}. Wrappers are not converted yet: "
        "save the text part as a causal language model of its own, with its head, and convert that.",
        "later": f"around a text part that is convertible in principle: {text}; {verdict.reason}. Wrappers are not "
        "converted yet either.",
        "refused": f"whose text part, {text}, cannot be converted either: {verdict.reason}.",
        "unknown": f"around a text part, {text}, and whether that could be converted has not been looked at; wrappers "
        "are not converted yet.",
    }
    raise UnsupportedModelError(f"{name} is a wrapper {sentence[verdict.kind]}{quantized}")


def _find_text_part(raw: Mapping[str, Any]) -> _TextPart | None:
    inner, path = raw, []
    while (key := next((key for key in _TEXT if _is_part(inner, key)), None)) is not None:
        inner = inner[key] if "model_type" in inner[key] else {**inner[key], "model_type": _default_text(inner)}
        path.append(key)
    if path:
        return _TextPart(".".join(path[:4]), dict(inner))
    if any(raw.get(key) for key in _SENSES):
        return _TextPart("in the config itself", {**raw, "model_type": _named(raw)})
    return None


def _is_part(raw: Mapping[str, Any], key: str) -> bool:
    # An empty one is the default of a wrapper, and nothing in the config of a language model.
    return isinstance(raw.get(key), Mapping) and (bool(raw[key]) or str(raw.get("model_type")) not in FAMILIES)


def _default_text(raw: Mapping[str, Any]) -> str | None:
    """Return what transformers takes a text part for whose config does not say."""
    model_type = raw.get("model_type")
    if not isinstance(model_type, str) or model_type not in CONFIG_MAPPING:
        return None
    try:
        text: str = CONFIG_MAPPING[model_type]().get_text_config().model_type
    except Exception:  # a class that wants arguments has no default
        return None
    return text


def _named(raw: Mapping[str, Any]) -> str | None:
    """Return the model type of a text part that lies in the open, by whatever names it."""
    model_type, classes = raw.get("model_type"), raw.get("architectures")
    if isinstance(model_type, str) and (model_type in _COMPUTED_AS or model_type in FAMILIES or find_refusal(raw)):
        return model_type
    names = [model_type, *(classes if isinstance(classes, list) else ())]
    text = " ".join(str(name) for name in names).casefold().replace("llava", "")
    return next((stem for stem in _STEMS if stem in text), None)


def _judge(raw: Mapping[str, Any], model_type: str) -> _Verdict:
    if (refusal := find_refusal(raw)) is not None:
        return _Verdict("later" if refusal.later else "refused", refusal.reason)
    computed_as = _COMPUTED_AS.get(model_type, model_type)
    if computed_as not in FAMILIES:
        return _Verdict("unknown")
    # As its own config.json would have it.
    alone = {key: value for key, value in raw.items() if key not in (*_SENSES, "quantization_config", "auto_map")}
    alone["model_type"] = computed_as
    for key in ("rope_scaling", "rope_parameters"):
        if key in alone:
            alone[key] = _on_text(alone[key])
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "config.json").write_text(json.dumps(alone), encoding="utf-8")
        try:
            describe(load_config(Path(folder)), max_position_embeddings=1)
        except TransMLAError as error:
            reason = str(error).replace(f"{folder}/", "").rpartition("model cannot be converted: ")[2]
            return _Verdict("refused", reason.rstrip("."))
    return _Verdict("convertible")


def _on_text(scaling: Any) -> Any:
    """Return a RoPE of several axes as it is on text, whose tokens have one position on all, in today's spelling."""
    if not isinstance(scaling, Mapping):
        return scaling
    plain = {key: value for key, value in scaling.items() if not key.startswith("mrope")}
    for key in ("type", "rope_type"):
        if key in plain:
            plain[key] = {"mrope": "default", "su": "longrope"}.get(str(plain[key]), plain[key])
    return None if plain in ({}, {"type": "default"}, {"rope_type": "default"}) else plain
