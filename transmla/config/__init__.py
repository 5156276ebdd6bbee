"""What the user asks for. Each field is described once; the command line takes its help text from the same place."""

from collections.abc import Mapping
from types import MappingProxyType

from transmla.config.bench import BenchRequest
from transmla.config.comparison import ComparisonRequest
from transmla.config.convert import (
    Biases,
    ConvertRequest,
    EngineName,
    LatentNorm,
    Profile,
)
from transmla.config.evaluate import EvalRequest, ProbeKind
from transmla.config.finetune import FinetuneRequest, Overflow, Train
from transmla.config.generate import GenerateRequest
from transmla.config.inspect import InspectRequest
from transmla.config.request import (
    Bos,
    ComputeDtype,
    OutputDtype,
    Request,
    SourceRequest,
    read_recipe,
)
from transmla.config.sizes import SizesRequest
from transmla.config.verify import VerifyRequest

#: What each command is asked.
REQUESTS: Mapping[str, type[Request]] = MappingProxyType(
    {
        "inspect": InspectRequest,
        "sizes": SizesRequest,
        "convert": ConvertRequest,
        "finetune": FinetuneRequest,
        "eval": EvalRequest,
        "bench": BenchRequest,
        "generate": GenerateRequest,
        "verify": VerifyRequest,
    }
)

__all__ = [
    "REQUESTS",
    "BenchRequest",
    "Biases",
    "Bos",
    "ComparisonRequest",
    "ComputeDtype",
    "ConvertRequest",
    "EngineName",
    "EvalRequest",
    "FinetuneRequest",
    "GenerateRequest",
    "InspectRequest",
    "LatentNorm",
    "OutputDtype",
    "Overflow",
    "ProbeKind",
    "Profile",
    "Request",
    "SizesRequest",
    "SourceRequest",
    "Train",
    "VerifyRequest",
    "read_recipe",
]
