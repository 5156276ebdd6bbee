"""Turn absorbed decoding on and off in a loaded model.

A model is changed in place, by the class of its attention modules and by nothing else: weights and their names, config,
hooks and wrapped projections stay, so that it trains and is saved as before.
"""

from __future__ import annotations

from types import MethodType
from typing import TypeVar

from torch import nn
from transformers.models.deepseek_v2.modeling_deepseek_v2 import DeepseekV2Attention
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3Attention

from transmla.errors import UnsupportedModelError
from transmla.modeling.attention import AbsorbedDeepseekV2Attention, AbsorbedDeepseekV3Attention

Model = TypeVar("Model", bound=nn.Module)

ABSORBED: dict[type[nn.Module], type[nn.Module]] = {
    DeepseekV2Attention: AbsorbedDeepseekV2Attention,
    DeepseekV3Attention: AbsorbedDeepseekV3Attention,
}
EXPANDED = {absorbed: stock for stock, absorbed in ABSORBED.items()}


def absorb(model: Model) -> Model:
    """Let a DeepSeek-V2 or V3 model decode on its cached latents, with the logits that it had; return the same model.

    Raises:
        UnsupportedModelError: the model has no attention with a latent.
    """
    if not has_latent_attention(model):
        raise UnsupportedModelError(
            f"{type(model).__name__} has no latent attention of DeepSeek-V2 or V3 to absorb: "
            "convert it with `transmla convert`, and load the result with Transformers."
        )
    _exchange(model, ABSORBED)
    return model


def expand(model: Model) -> Model:
    """Undo :func:`absorb`; return the same model, as Transformers loads it."""
    _exchange(model, EXPANDED)
    return model


def has_latent_attention(model: nn.Module) -> bool:
    """Say whether :func:`absorb` can, or did, change a model."""
    return any(isinstance(module, tuple(ABSORBED)) for module in model.modules())


def _exchange(model: nn.Module, classes: dict[type[nn.Module], type[nn.Module]]) -> None:
    for module in model.modules():
        if (new := classes.get(type(module))) is None:
            continue
        module.__class__ = new
        # Where Accelerate spreads a model over devices, its hook calls the method that it found.
        if isinstance(vars(module).get("_old_forward"), MethodType):
            vars(module)["_old_forward"] = MethodType(new.forward, module)
