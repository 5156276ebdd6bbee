"""Models as stock Transformers loads them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.utils import logging

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


def load_model(model: Source, *, dtype: str, device: torch.device, num_layers: int | None = None) -> PreTrainedModel:
    """Load a model for inference, in the form that decodes fast, and name it as the user did.

    The type ``auto`` is the stored one; ``num_layers`` leaves out all layers after the first ones.

    Raises:
        CheckpointError: it cannot be read, or its weights are not all there.
    """
    kind = dtype if dtype == "auto" else getattr(torch, dtype)
    options = {} if num_layers is None else {"config": _first_layers(model, num_layers)}
    with _silence(num_layers is not None):
        loaded, info = _load(AutoModelForCausalLM, model, "model", dtype=kind, output_loading_info=True, **options)
    # Transformers fills what is absent with random numbers and merely warns.
    if absent := sorted(map(str, {*info["missing_keys"], *info["mismatched_keys"]})):
        raise CheckpointError(
            f"{model.name} lacks {len(absent)} of its weights, {absent[0]} among them: convert or download it again."
        )
    loaded.name_or_path = model.name
    loaded = loaded.to(device).eval()
    return absorb(loaded) if has_latent_attention(loaded) else loaded


def _first_layers(model: Source, num_layers: int) -> PreTrainedConfig:
    """Return the config of the model's first layers, with its head behind them."""
    config = _load(AutoConfig, model, "config")
    config.num_hidden_layers = min(num_layers, config.num_hidden_layers)
    if getattr(config, "layer_types", None) is not None:
        config.layer_types = config.layer_types[: config.num_hidden_layers]
    return config


@contextmanager
def _silence(wanted: bool) -> Iterator[None]:
    """Say nothing of weights that are left out, where that is what was asked for."""
    verbosity = logging.get_verbosity()
    if wanted:
        logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)


def _load(factory: Any, model: Source, what: str, **options: Any) -> Any:
    try:
        with empty_matrices_are_fine():
            return factory.from_pretrained(model.folder, trust_remote_code=False, **options)
    except Exception as error:
        reason = " ".join(str(error).split())
        raise CheckpointError(f"The {what} of {model.name} cannot be loaded: {reason}") from error
