"""Models as stock Transformers loads them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig, PreTrainedConfig, PreTrainedModel
from transformers.utils import logging

from transmla.arch.skeleton import empty_matrices_are_fine
from transmla.checkpoint.source import Source
from transmla.errors import CheckpointError, UnsupportedModelError, UsageError
from transmla.modeling.absorption import absorb, has_latent_attention


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
    """Return whether a config is of the quantizable profile, the only one whose norms have a large eps."""
    return config.model_type == "deepseek_v3" and config.rms_norm_eps > 1e-3


def load_model(
    model: Source, *, dtype: str, device: torch.device, flag: str = "--dtype", num_layers: int | None = None
) -> PreTrainedModel:
    """Load a model for inference, in the form that decodes fast, and name it as the user did.

    How it generates is not its own matter but that of whoever has it generate, and neither is what it puts out.

    Args:
        model: the model.
        dtype: type of its weights; ``auto`` is the stored one.
        device: where to.
        flag: that chooses the type.
        num_layers: leave out all layers after the first ones.

    Raises:
        CheckpointError: it cannot be read, or its weights are not all there.
        UsageError: it cannot be computed in this type.
    """
    options = {"dtype": dtype if dtype == "auto" else getattr(torch, dtype), "generation_config": GenerationConfig()}
    if num_layers is not None:
        options["config"] = _first_layers(model, num_layers)
    with _silence(num_layers is not None):
        loaded, info = _load(AutoModelForCausalLM, model, "model", output_loading_info=True, **options)
    # Transformers fills what is absent with random numbers and merely warns.
    if absent := sorted(map(str, {*info["missing_keys"], *info["mismatched_keys"]})):
        raise CheckpointError(
            f"{model.name} lacks {len(absent)} of its weights, {absent[0]} among them: convert or download it again."
        )
    _check_latents_survive(loaded, model.name, flag)
    for config in {id(part): part for part in (loaded.config, loaded.config.get_text_config())}.values():
        config.return_dict, config.output_hidden_states = True, False
    loaded.name_or_path = model.name
    loaded = loaded.to(device).eval()
    return absorb(loaded) if has_latent_attention(loaded) else loaded


def _first_layers(model: Source, num_layers: int) -> PreTrainedConfig:
    """Return the config of the model's first layers, with its head after them."""
    config = _load(AutoConfig, model, "config")
    config.num_hidden_layers = min(num_layers, config.num_hidden_layers)
    if getattr(config, "layer_types", None) is not None:
        config.layer_types = config.layer_types[: config.num_hidden_layers]
    return config


@contextmanager
def _silence(wanted: bool) -> Iterator[None]:
    """Silence what is said of weights that are left out, where that is what was asked for."""
    verbosity = logging.get_verbosity()
    if wanted:
        logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)


def _check_latents_survive(model: PreTrainedModel, name: str, flag: str) -> None:
    """Refuse a type in which the rows that a neutral norm follows are no longer what they were.

    They are written so small that the norm's eps is all that it divides by, and below the normal numbers of float16
    digits get lost. The weights tell, whatever a report says: rows before a norm that does something are far larger.
    """
    for rows in _rows_behind_norms(model):
        if rows.dtype == torch.float16 and rows.abs().float().median() < torch.finfo(rows.dtype).tiny:
            raise UsageError(
                f"{name} cannot be computed in float16, which has no digits for its latents: they are about "
                f"{rows.abs().max().item():.0e}, because a norm must not change them. Pass {flag} bfloat16 or float32."
            )


def _rows_behind_norms(model: nn.Module) -> Iterator[torch.Tensor]:
    for module in model.modules():
        if hasattr(module, "kv_a_proj_with_mqa") and hasattr(module, "kv_a_layernorm"):
            attention: Any = module
            yield attention.kv_a_proj_with_mqa.weight[: attention.kv_lora_rank]
            if attention.q_lora_rank is not None:
                yield attention.q_a_proj.weight


def _load(factory: Any, model: Source, what: str, **options: Any) -> Any:
    try:
        with empty_matrices_are_fine():
            return factory.from_pretrained(model.folder, trust_remote_code=False, **options)
    except Exception as error:
        reason = " ".join(str(error).split())
        raise CheckpointError(f"The {what} of {model.name} cannot be loaded: {reason}") from error
