"""Turn absorbed decoding on and off in a loaded model.

A model is changed in place, by the class of its attention modules and by nothing else: weights and their names, config,
hooks and wrapped projections stay, so that it trains and is saved as before.
"""

from __future__ import annotations

from types import MethodType
from typing import TypeVar, cast

from torch import nn
from transformers.models.deepseek_v2.modeling_deepseek_v2 import DeepseekV2Attention
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3Attention

from transmla.errors import UnsupportedModelError
from transmla.modeling.absorbed_attention import AbsorbedDeepseekV2Attention, AbsorbedDeepseekV3Attention
from transmla.records import Form

Model = TypeVar("Model", bound=nn.Module)

ABSORBED: dict[type[nn.Module], type[nn.Module]] = {
    DeepseekV2Attention: AbsorbedDeepseekV2Attention,
    DeepseekV3Attention: AbsorbedDeepseekV3Attention,
}
# What the absorbed form computes in its own way.
_REPLACED = ("forward", "expand_kv")


def absorb(model: Model) -> Model:
    """Let a DeepSeek-V2 or V3 model decode on its cached latents, with the logits that it had; return the same model.

    Raises:
        UnsupportedModelError: the model has no attention with a latent, or one that computes something of its own. The
            model stays as it is.
    """
    if not has_latent_attention(model):
        raise UnsupportedModelError(
            f"{type(model).__name__} has no latent attention of DeepSeek-V2 or V3 to absorb: "
            "convert it with `transmla convert`, and load the result with Transformers."
        )
    modules = [module for module in model.modules() if _is_latent(module) and not _is_absorbed(module)]
    classes = {given: _absorbed_class(given) for given in {type(module) for module in modules}}
    for module in modules:
        # Accelerate keeps the method that it hides; whoever hides it otherwise would hide the absorbed one as well.
        if "forward" in vars(module) and "_old_forward" not in vars(module):
            raise UnsupportedModelError(
                f"A {type(module).__name__} of this model has a forward of its own (it was patched): absorb the model "
                "first, and patch it then."
            )
    for module in modules:
        _change_class(module, classes[type(module)])
    return model


def expand(model: Model) -> Model:
    """Undo :func:`absorb`; return the same model, as Transformers loads it."""
    for module in model.modules():
        if _is_absorbed(module):
            _change_class(module, _expanded_class(type(module)))
    return model


def set_form(model: Model, form: Form) -> Model:
    """Switch a model, in place, to one of the forms that it has; return it."""
    return absorb(model) if form == "absorbed" else expand(model)


def has_latent_attention(model: nn.Module) -> bool:
    """Return whether a model has the attention that :func:`absorb` is for."""
    return any(_is_latent(module) for module in model.modules())


def _is_latent(module: nn.Module) -> bool:
    return isinstance(module, tuple(ABSORBED))


def _is_absorbed(module: nn.Module) -> bool:
    return isinstance(module, tuple(ABSORBED.values()))


def _absorbed_class(given: type[nn.Module]) -> type[nn.Module]:
    """Return the absorbed form of a class of Transformers, or of a subclass that computes the same.

    Raises:
        UnsupportedModelError: a subclass that does not.
    """
    stock = next(stock for stock in ABSORBED if issubclass(given, stock))
    if given is stock:
        return ABSORBED[stock]
    if own := [name for name in _REPLACED if getattr(given, name) is not getattr(stock, name)]:
        raise UnsupportedModelError(
            f"{given.__name__} changes {own[0]} of {stock.__name__}, which the absorbed form would not compute: load "
            "the model with Transformers' own class."
        )
    return type(f"Absorbed{given.__name__}", (ABSORBED[stock], given), {})


def _expanded_class(absorbed: type[nn.Module]) -> type[nn.Module]:
    forms = tuple(ABSORBED.values())
    stock = (base for base in absorbed.__mro__ if issubclass(base, tuple(ABSORBED)) and not issubclass(base, forms))
    return cast(type[nn.Module], next(stock))


def _change_class(module: nn.Module, new: type[nn.Module]) -> None:
    module.__class__ = new
    # Where Accelerate spreads a model over devices, its hook calls the method that it found.
    if isinstance(vars(module).get("_old_forward"), MethodType):
        vars(module)["_old_forward"] = MethodType(new.forward, module)
