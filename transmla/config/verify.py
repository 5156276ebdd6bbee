"""What ``transmla verify`` is asked."""

from __future__ import annotations

from typing import ClassVar

from pydantic import Field

from transmla.config.request import Request


class VerifyRequest(Request):
    """What ``transmla verify`` is asked."""

    ARGUMENTS: ClassVar[tuple[str, ...]] = ("model",)

    model: str = Field(description="The checkpoint: folder, hub id or id@revision.")
    source: str | None = Field(
        None, description="The model that it was converted from: compare the logits on a few short texts."
    )
    gguf_file: str | None = Field(None, description="Name of a GGUF file inside --source.")
    revision: str | None = Field(None, description="Branch, tag or commit of a hub MODEL.")
    token: str | None = Field(None, description="Hub token; the logged-in one is used by default.", exclude=True)
    device: str = Field("auto", description="Device of the comparison: auto, cpu, cuda, cuda:1, mps.")
