"""Models as stock Transformers loads them, and what must hold before they are compared."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import transformers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from transmla import __version__
from transmla.arch.skeleton import empty_matrices_are_fine
from transmla.checkpoint.source import Source, open_source
from transmla.config import ComparisonRequest
from transmla.errors import CheckpointError, UnsupportedModelError, UsageError
from transmla.evaluate.report import Form, Versions
from transmla.modeling import absorb, expand, has_latent_attention


def find_models(request: ComparisonRequest) -> list[Source]:
    """Find the source and then the converted models, and read no weight.

    Raises:
        TransMLAError: one of them is not there.
    """
    source = open_source(request.source, gguf_file=request.gguf_file, revision=request.revision, token=request.token)
    return [source, *(open_source(name, token=request.token) for name in request.converted)]


def check_comparable(models: Sequence[Source], *, window: int, flag: str = "--window") -> None:
    """Refuse, before any weight is read, models whose tokens or contexts do not fit.

    Raises:
        CheckpointError: a config is missing, or a vocabulary differs from the first model's.
        UnsupportedModelError: a checkpoint that transformers loads but does not compute.
        UsageError: the window is longer than a model's context.
    """
    configs = [read_config(model) for model in models]
    for model, config in zip(models, configs, strict=True):
        if config.vocab_size != configs[0].vocab_size:
            raise CheckpointError(
                f"{model.name} has {config.vocab_size} tokens in its vocabulary and {models[0].name} has "
                f"{configs[0].vocab_size}: only a model that was converted from this source can be compared with it."
            )
        context = getattr(config, "max_position_embeddings", None)
        if context is not None and window > context:
            raise UsageError(f"{model.name} has a context of {context} tokens: lower {flag}, which is {window}.")


def read_config(model: Source) -> PreTrainedConfig:
    """Read the config of a model's language part.

    Raises:
        CheckpointError: it is missing, or cannot be read.
        UnsupportedModelError: a checkpoint that transformers loads but does not compute.
    """
    config = _load(AutoConfig, model, "config").get_text_config()
    # Transformers has its own eps for the latent norm, and would give garbage without a word.
    if config.model_type == "deepseek_v3" and config.rms_norm_eps > 1e-3:
        raise UnsupportedModelError(
            f"{model.name} was converted with --profile quantizable, which transformers cannot compute "
            f"(rms_norm_eps {config.rms_norm_eps:g}): take the portable profile of the same conversion."
        )
    return config


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


def take_form(model: PreTrainedModel, form: Form) -> PreTrainedModel:
    """Switch a model, in place, to one of the forms that it has; return it."""
    return absorb(model) if form == "absorbed" else expand(model)


def loaded_versions() -> Versions:
    """Return the versions of the libraries that compute."""
    return Versions(transmla=__version__, torch=torch.__version__, transformers=transformers.__version__)


def _load(factory: Any, model: Source, what: str, **options: Any) -> Any:
    try:
        with empty_matrices_are_fine():
            return factory.from_pretrained(model.folder, trust_remote_code=False, **options)
    except Exception as error:
        reason = " ".join(str(error).split())
        raise CheckpointError(f"The {what} of {model.name} cannot be loaded: {reason}") from error
