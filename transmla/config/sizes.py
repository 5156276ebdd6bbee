"""What ``transmla sizes`` is asked: a source, shares of its cache, and what decides a conversion at any size."""

from __future__ import annotations

from copy import deepcopy
from typing import Annotated, Any

from pydantic import BeforeValidator, Field

from transmla.config.convert import Biases, ConvertRequest, EngineName, LatentNorm, Profile
from transmla.config.inspect import MAX_POSITION_EMBEDDINGS
from transmla.config.request import Bos, ComputeDtype, OutputDtype, SourceRequest, as_tuple, split_at_commas


def _as_in_convert(name: str) -> Any:
    """Return a field of ``convert``, with its default and the one description of it."""
    return deepcopy(ConvertRequest.model_fields[name])


class SizesRequest(SourceRequest):
    """What ``transmla sizes`` is asked; whatever it has in common with ``convert`` means the same there."""

    shares: Annotated[tuple[Annotated[float, Field(gt=0, le=1)], ...], BeforeValidator(split_at_commas)] = Field(
        (0.125, 0.167, 0.25, 0.333, 0.5, 0.667),
        min_length=1,
        description="Cache sizes to compare, as shares of the source's; several with commas, or repeat the flag.",
    )
    max_position_embeddings: int | None = MAX_POSITION_EMBEDDINGS
    engine: Annotated[tuple[EngineName, ...], BeforeValidator(as_tuple)] = _as_in_convert("engine")

    calibration: Annotated[tuple[str, ...], BeforeValidator(as_tuple)] = _as_in_convert("calibration")
    text_column: str | None = _as_in_convert("text_column")
    bos: Bos = _as_in_convert("bos")
    num_windows: int | None = Field(
        None,
        ge=1,
        description="Number of calibration windows of the conversion, 128 by default; the first 16 are compared on.",
    )
    window: int = _as_in_convert("window")
    repeats: float | None = _as_in_convert("repeats")
    num_heldout_windows: int = _as_in_convert("num_heldout_windows")
    batch_size: int = _as_in_convert("batch_size")
    seed: int = _as_in_convert("seed")

    profile: Profile = _as_in_convert("profile")
    latent_norm: LatentNorm = _as_in_convert("latent_norm")
    biases: Biases = _as_in_convert("biases")
    dtype: OutputDtype = _as_in_convert("dtype")
    compute_dtype: ComputeDtype = _as_in_convert("compute_dtype")
    device: str = _as_in_convert("device")
