"""Models that are compared, and what must hold before they are."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import transformers
from transformers import PreTrainedModel

from transmla import __version__
from transmla.checkpoint.source import Source, open_source
from transmla.config import ComparisonRequest
from transmla.errors import CheckpointError, UsageError
from transmla.evaluate.report import Form, Versions
from transmla.modeling import absorb, expand
from transmla.modeling.load import read_config


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
    contexts = [getattr(config, "max_position_embeddings", None) for config in configs]
    # A conversion may reach further than its source says (--max-position-embeddings), and so does its source then.
    contexts[0] = None if None in contexts else max(context for context in contexts if context is not None)
    for model, config, context in zip(models, configs, contexts, strict=True):
        if config.vocab_size != configs[0].vocab_size:
            raise CheckpointError(
                f"{model.name} has {config.vocab_size} tokens in its vocabulary and {models[0].name} has "
                f"{configs[0].vocab_size}: only a model that was converted from this source can be compared with it."
            )
        if context is not None and window > context:
            raise UsageError(f"{model.name} has a context of {context} tokens: lower {flag}, which is {window}.")


def take_form(model: PreTrainedModel, form: Form) -> PreTrainedModel:
    """Switch a model, in place, to one of the forms that it has; return it."""
    return absorb(model) if form == "absorbed" else expand(model)


def loaded_versions() -> Versions:
    """Return the versions of the libraries that compute."""
    return Versions(transmla=__version__, torch=torch.__version__, transformers=transformers.__version__)
