"""From a config to the sizes and frequencies of its attention, or a sentence that says why not."""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from transformers import CONFIG_MAPPING, AutoConfig, PretrainedConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.utils import logging

from transmla.arch.context import choose_context
from transmla.arch.experts import Mixture
from transmla.arch.families import FAMILIES, Family
from transmla.arch.refused import also_quantized, check_not_refused
from transmla.arch.unread import unread_keys
from transmla.errors import CheckpointError, UnsupportedModelError

# RoPE types whose frequencies are the same at every length up to ``max_position_embeddings``, so that a grid can hold
# them. LongRoPE has two grids, and changes from one to the other on the way.
_ROPE = ("default", "linear", "dynamic", "yarn", "llama3", "longrope")
_NO_SCALING = ("rope_theta", "partial_rotary_factor")


@dataclass(frozen=True, eq=False)
class AttentionSpec:
    """Everything about the source that the conversion needs to know.

    Attributes:
        family: the row of the family table.
        frequencies: θ_l of each rotary pair, in radians per token, as the source model computes them.
        rope_theta, rope_type: base of the frequencies and how they were scaled.
        rope_scaling: type and parameters of the scaling, as transformers' config has them.
        logit_scale: factor on the logits that comes with the scaling (YaRN, LongRoPE).
        biases: projections of attention that have one.
        mixture: the experts, where the MLP is a mixture of them.
        unread: keys of config.json that are set, and that transformers does not read.
    """

    family: Family
    model_type: str
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    vocab_size: int
    max_position_embeddings: int
    rms_norm_eps: float
    rope_theta: float
    rope_type: str
    frequencies: Float[Tensor, " pair"]
    rope_scaling: Mapping[str, Any]
    logit_scale: float = 1.0
    biases: frozenset[str] = frozenset()
    mixture: Mixture | None = None
    unread: frozenset[str] = frozenset()

    @property
    def num_pairs(self) -> int:
        """Rotary pairs of one head."""
        return self.head_dim // 2

    @property
    def num_key_value_groups(self) -> int:
        """Query heads that share one key/value head."""
        return self.num_attention_heads // self.num_key_value_heads

    @property
    def key_size(self) -> int:
        """Numbers in the keys (or the values) of one token, all heads together."""
        return self.num_key_value_heads * self.head_dim

    @property
    def cache_numbers(self) -> int:
        """Numbers cached per token and layer: keys and values."""
        return 2 * self.key_size

    def layer_prefix(self, index: int) -> str:
        """Return the prefix of every tensor of decoder layer ``index``."""
        return f"{self.family.layers}.{index}."


def load_config(folder: Path) -> PretrainedConfig:
    """Read ``config.json`` of a family that the table knows.

    Raises:
        CheckpointError: absent, not JSON, or refused by transformers' own validation.
        UnsupportedModelError: a family that is not in the table.
    """
    path = folder / "config.json"
    raw = read_raw_config(folder)
    model_type = check_family(raw, path)
    # What transformers warns of is either refused below, or nothing that decides anything here.
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        config = _read_config(folder, model_type, raw)
    except Exception as error:  # transformers validates with several exception types of its own
        scaling = raw.get("rope_scaling")
        old = isinstance(scaling, dict) and scaling.get("type") == "su"
        hint = " (transformers reads the spelling su no more: write longrope in its place)" if old else ""
        found = _culprit(model_type, raw, _sentence(error))
        raise CheckpointError(f"{path} is not a valid {model_type} config: {_sentence(error)}{found}{hint}.") from None
    finally:
        logging.set_verbosity(verbosity)
    # A config may ask for another class than it names: mistral with layer_types is a ministral.
    check_family(raw | {"model_type": config.model_type}, path)
    if config.is_heterogeneous:
        raise UnsupportedModelError(
            f"This {FAMILIES[config.model_type].title} model cannot be converted: its layers differ, and those of "
            "DeepSeek-V3 are alike (config.json: per_layer_config)."
        )
    if getattr(config, "head_dim", None) is None:
        # Some families compute it in the model, others in the config.
        config.head_dim = config.hidden_size // max(1, config.num_attention_heads)
    return config


def read_raw_config(folder: Path) -> dict[str, Any]:
    """Read ``config.json`` as it stands; nothing where it holds no object.

    Raises:
        CheckpointError: absent, or not JSON.
    """
    path = folder / "config.json"
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} cannot be read as JSON: {error}.") from None
    return raw if isinstance(raw, dict) else {}


def check_family(raw: Mapping[str, Any], path: Path) -> str:
    """Return the ``model_type`` of a config as it stands, which the table knows.

    Raises:
        UnsupportedModelError: a family that is not in the table, or none at all.
    """
    check_not_refused(raw)
    model_type = raw.get("model_type")
    if not isinstance(model_type, str) or model_type not in FAMILIES:
        raise UnsupportedModelError(
            f"model_type {_short(model_type)} in {path} is not supported; supported: {', '.join(sorted(FAMILIES))}. "
            f"Whether DeepSeek-V3 could hold it has not been looked at.{also_quantized(raw)}"
        )
    return model_type


def _culprit(model_type: str, raw: Mapping[str, Any], sentence: str) -> str:
    """Name the key without which transformers would read a config, where its own sentence does not."""

    def is_read(keys: Mapping[str, Any]) -> bool:
        try:
            AutoConfig.for_model(
                model_type, **{key: value for key, value in keys.items() if key != "model_type"}
            ).to_dict()
        except Exception:
            return False
        return True

    if model_type in CONFIG_MAPPING and not is_read(raw):
        for key, value in raw.items():
            if key not in sentence and is_read({other: raw[other] for other in raw if other != key}):
                return f" (config.json: {key} = {_short(value)})"
    return ""


def _read_config(folder: Path, model_type: str, raw: dict[str, Any]) -> PretrainedConfig:
    computed_by = FAMILIES[model_type].computed_by
    if model_type in CONFIG_MAPPING:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
        raw = config.to_dict()
        if computed_by is None:
            return config
    config = AutoConfig.for_model(computed_by, **{key: value for key, value in raw.items() if key != "model_type"})
    # That is what computes it; this is what it is.
    config.model_type = model_type
    return config


def describe(config: PretrainedConfig, *, max_position_embeddings: int | None = None) -> AttentionSpec:
    """Describe the attention of a supported model.

    Args:
        config: of the model.
        max_position_embeddings: longest context that is asked for, in tokens; the model's own by default.

    Raises:
        UsageError: a context longer than the model's positions reach.
        UnsupportedModelError: the target cannot hold the model; the exact reason.
        CheckpointError: sizes that contradict each other.
    """
    family = FAMILIES[config.model_type]
    for key, allowed, reason in ((row.key, row.allowed, row.reason) for row in family.requirements):
        if hasattr(config, key) and (value := getattr(config, key)) not in allowed:
            raise UnsupportedModelError(
                f"This {family.title} model cannot be converted: {reason} (config.json: {key} = {_short(value)})."
            )
    for key in _SIZES:
        if not isinstance(size := getattr(config, key), int) or isinstance(size, bool) or not 1 <= size <= _LARGEST:
            raise CheckpointError(f"config.json: {key} must be a number from 1 to {_LARGEST:,}, found {_short(size)}.")
    if not 0 < config.rms_norm_eps < math.inf:
        raise CheckpointError(f"config.json: rms_norm_eps must be a positive number, found {config.rms_norm_eps}.")
    heads, kv_heads, head_dim = config.num_attention_heads, config.num_key_value_heads, config.head_dim
    if heads % kv_heads:
        raise CheckpointError(
            f"config.json: {heads} attention heads cannot be shared out among {kv_heads} key/value heads."
        )
    if head_dim % 2:
        raise CheckpointError(f"config.json: RoPE needs an even head_dim, found {head_dim}.")
    sizes = {key: getattr(config, key) for key in _SIZES}
    theta, rope_type, frequencies, scaling = _frequencies(config, family)
    mixture = _mixture(config, family)
    # Last, because it gives an advice, after which nothing else may be in the way.
    sizes["max_position_embeddings"] = choose_context(config, family.title, max_position_embeddings)
    return AttentionSpec(
        family=family,
        model_type=config.model_type,
        rms_norm_eps=float(config.rms_norm_eps),
        mixture=mixture,
        unread=unread_keys(config, family),
        biases=frozenset(family.biased if family.bias_key is None or getattr(config, family.bias_key) else ()),
        rope_theta=theta,
        rope_type=rope_type,
        frequencies=frequencies,
        rope_scaling=MappingProxyType(
            {key: value for key, value in config.rope_parameters.items() if key not in _NO_SCALING}
        ),
        # Queries and keys are both scaled.
        logit_scale=scaling**2,
        **sizes,
    )


def _mixture(config: PretrainedConfig, family: Family) -> Mixture | None:
    if family.experts is None:
        return None
    mixture = Mixture(config.num_local_experts, config.num_experts_per_tok, getattr(config, family.expert_size))
    if not 1 <= mixture.num_experts_per_tok <= mixture.num_experts or mixture.intermediate_size < 1:
        raise CheckpointError(
            f"config.json: a token cannot have {mixture.num_experts_per_tok} of {mixture.num_experts} experts of "
            f"{mixture.intermediate_size} numbers."
        )
    if mixture.num_experts == 1:
        raise UnsupportedModelError(
            f"This {family.title} model cannot be converted: DeepSeek-V3 chooses among two experts or more, and this "
            "one has a single one, so that it is a dense model by another name (config.json: num_local_experts = 1)."
        )
    return mixture


# More than any model has; sizes beyond would take a machine's time before they are found to fit nothing.
_LARGEST = 2**24

_SIZES = (
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "vocab_size",
    "max_position_embeddings",
)


def _frequencies(config: PretrainedConfig, family: Family) -> tuple[float, str, Float[Tensor, " pair"], float]:
    """Return base, type, frequencies, and the factor on cosines and sines."""
    parameters = config.rope_parameters
    if by_layer := [key for key, value in parameters.items() if isinstance(value, dict)]:
        raise UnsupportedModelError(
            f"This {family.title} model cannot be converted: its layers have RoPE of several kinds, and in DeepSeek-V3 "
            f"all have the same (config.json: rope_parameters has {_short(by_layer[0])})."
        )
    rope_type, partial = parameters.get("rope_type"), parameters.get("partial_rotary_factor", 1)
    if rope_type not in _ROPE:
        raise UnsupportedModelError(f"RoPE type {_short(rope_type)} is not supported; supported: {', '.join(_ROPE)}.")
    if partial != 1:
        raise UnsupportedModelError(
            f"This {family.title} model cannot be converted: heads that are rotated only in part are not supported "
            f"(config.json: partial_rotary_factor = {_short(partial)})."
        )
    try:
        theta, scaling = float(parameters["rope_theta"]), 1.0
        if rope_type == "default":
            # In float32 with float32 intermediate steps, as the source computes them: exact mode repeats these bits.
            exponents = torch.arange(0, config.head_dim, 2, dtype=torch.float) / config.head_dim
            frequencies = 1.0 / (theta**exponents)
        else:
            frequencies, scaling = ROPE_INIT_FUNCTIONS[rope_type](config, torch.device("cpu"))
            scaling = float(scaling)
    except Exception as error:  # transformers computes with whatever the config holds
        raise CheckpointError(f"config.json: rope_parameters cannot be used: {_sentence(error)}.") from None
    if not (frequencies.isfinite() & (frequencies > 0)).all() or not 0 < scaling < math.inf:
        raise CheckpointError(
            f"config.json: rope_parameters must give positive frequencies, found {_short(frequencies.tolist())}."
        )
    return theta, rope_type, frequencies, scaling


def _sentence(error: Exception) -> str:
    return " ".join(str(error).split())


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
