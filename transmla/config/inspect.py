"""What ``transmla inspect`` is asked."""

from __future__ import annotations

from typing import Any

from pydantic import Field

from transmla.config.request import SourceRequest

MAX_POSITION_EMBEDDINGS: Any = Field(
    None,
    ge=1,
    description="Longest context of the result, in tokens; the source's by default. A model with a sliding window, or "
    "with a RoPE that changes on the way, can be converted for contexts within; one whose RoPE is scaled for longer "
    "ones (linear, yarn), for contexts up to there.",
)


class InspectRequest(SourceRequest):
    """What ``transmla inspect`` is asked."""

    context: int = Field(8192, ge=1, description="Context length, in tokens, for which the KV cache is added up.")
    max_position_embeddings: int | None = MAX_POSITION_EMBEDDINGS
