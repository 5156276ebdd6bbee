"""What the user asks for. Each field is described once; the command line takes its help text from the same place."""

from transmla.config.compare import BenchRequest, ComparisonRequest, EvalRequest, GenerateRequest, VerifyRequest
from transmla.config.convert import (
    Biases,
    ConvertRequest,
    EngineName,
    InspectRequest,
    LatentNorm,
    Method,
    Profile,
)
from transmla.config.finetune import FinetuneRequest, Overflow, Train
from transmla.config.request import Bos, ComputeDtype, OutputDtype, Request, SourceRequest, flag_name, read_recipe

__all__ = [
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
    "Method",
    "OutputDtype",
    "Overflow",
    "Profile",
    "Request",
    "SourceRequest",
    "Train",
    "VerifyRequest",
    "flag_name",
    "read_recipe",
]
