"""Models as stock Transformers loads them."""

from __future__ import annotations

from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from transmla.arch.skeleton import empty_matrices_are_fine
from transmla.checkpoint.source import Source
from transmla.errors import CheckpointError, UnsupportedModelError
from transmla.modeling.exchange import absorb, has_latent_attention


def read_config(model: Source, *, computed: bool = True) -> PreTrainedConfig:
    """Read the config of a model's language part.

    Args:
        model: the model.
        computed: whether transformers is to compute it as it is.

    Raises:
        CheckpointError: it is missing, or cannot be read.
        UnsupportedModelError: a checkpoint that transformers loads but does not compute.
    """
    config = _load(AutoConfig, model, "config").get_text_config()
    # Transformers has its own eps for the latent norm, and would give garbage without a word.
    if computed and is_quantizable(config):
        raise UnsupportedModelError(
            f"{model.name} was converted with --profile quantizable, which transformers cannot compute "
            f"(rms_norm_eps {config.rms_norm_eps:g}): take the portable profile of the same conversion."
        )
    return config


def is_quantizable(config: PreTrainedConfig) -> bool:
    """Say whether a config is of the quantizable profile, the only one whose norms have a large eps."""
    return config.model_type == "deepseek_v3" and config.rms_norm_eps > 1e-3


def load_model(model: Source, *, dtype: str, device: torch.device) -> PreTrainedModel:
    """Load a model for inference, in the form that decodes fast, and name it as the user did.

    The type ``auto`` is the stored one.

    Raises:
        CheckpointError: it cannot be read, or its weights are not all there.
    """
    kind = dtype if dtype == "auto" else getattr(torch, dtype)
    loaded, info = _load(AutoModelForCausalLM, model, "model", dtype=kind, output_loading_info=True)
    # Transformers fills what is absent with random numbers and merely warns.
    if absent := sorted(map(str, {*info["missing_keys"], *info["mismatched_keys"]})):
        raise CheckpointError(
            f"{model.name} lacks {len(absent)} of its weights, {absent[0]} among them: convert or download it again."
        )
    loaded.name_or_path = model.name
    loaded = loaded.to(device).eval()
    return absorb(loaded) if has_latent_attention(loaded) else loaded


def _load(factory: Any, model: Source, what: str, **options: Any) -> Any:
    try:
        with empty_matrices_are_fine():
            return factory.from_pretrained(model.folder, trust_remote_code=False, **options)
    except Exception as error:
        reason = " ".join(str(error).split())
        raise CheckpointError(f"The {what} of {model.name} cannot be loaded: {reason}") from error
