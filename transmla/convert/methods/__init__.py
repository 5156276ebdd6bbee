"""Conversion methods, one file each, and the registry that ``--method`` looks into."""

from pydantic import ValidationError

from transmla.config import ConvertRequest
from transmla.convert.methods.base import ConvertedLayer, LayerGoal, Method, MethodOptions, PredictedCost
from transmla.convert.methods.exact import Exact
from transmla.convert.methods.fitted import Fitted
from transmla.convert.methods.rorope import RoRoPE
from transmla.errors import UsageError

__all__ = ["METHODS", "ConvertedLayer", "LayerGoal", "Method", "MethodOptions", "PredictedCost", "find_method"]

#: By name, in the order in which they are listed.
METHODS: dict[str, type[Method]] = {method.name: method for method in (Fitted, RoRoPE, Exact)}


def find_method(request: ConvertRequest) -> Method:
    """Return the method that a request asks for, with its options.

    Raises:
        UsageError: there is no such method, or it has no such option; which there are.
    """
    name = Exact.name if request.exact else request.method
    if name not in METHODS:
        raise UsageError(f"--method {name} is unknown: pass one of {', '.join(METHODS)}.")
    method = METHODS[name]
    try:
        return method(method.options_type.model_validate(request.method_options))
    except ValidationError as error:
        problems = "; ".join(f"{'.'.join(map(str, item['loc']))}: {item['msg']}" for item in error.errors())
        known = ", ".join(method.options_type.model_fields)
        raise UsageError(f"method_options of --method {name}: {problems}; it has {known}.") from None
