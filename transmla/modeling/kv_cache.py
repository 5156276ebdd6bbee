"""The name of the KV cache, which Transformers 5.24 changed: ``cache`` where it was ``past_key_values``."""

from __future__ import annotations

import inspect

from torch import nn
from transformers import Cache
from transformers.utils import ModelOutput

from transmla.errors import UnsupportedModelError

CACHE_NAMES = ("cache", "past_key_values")
"""The names of the argument and of the field, the newest first: asking for an old one warns."""


def cache_of(output: ModelOutput) -> Cache:
    """Return the cache that a forward pass, or ``generate``, left in its output.

    Raises:
        UnsupportedModelError: there is none.
    """
    for name in CACHE_NAMES:
        # By the fields, since newer outputs have the old name as a property that warns.
        if isinstance(cache := vars(output).get(name), Cache):
            return cache
    raise UnsupportedModelError(
        f"The model keeps no KV cache that could be measured or decoded on: {type(output).__name__} holds "
        f"{', '.join(output)}."
    )


def cache_argument(model: nn.Module) -> str:
    """Return the name of the argument by which a model takes its cache.

    Raises:
        UnsupportedModelError: it takes none.
    """
    parameters = inspect.signature(model.forward).parameters
    for name in CACHE_NAMES:
        if name in parameters:
            return name
    raise UnsupportedModelError(f"{type(model).__name__} takes no KV cache, so it cannot decode token by token.")
