"""What every command is asked that compares a source with others."""

from __future__ import annotations

from typing import ClassVar

from pydantic import Field

from transmla.config.request import Request


class ComparisonRequest(Request):
    """A source and what it is compared with."""

    ARGUMENTS: ClassVar[tuple[str, ...]] = ("source", "converted")

    source: str = Field(description="The model that the others are compared with: hub id, id@revision or folder.")
    converted: tuple[str, ...] = Field((), description="Converted models: folders or hub ids.")
    gguf_file: str | None = Field(None, description="Name of a GGUF file inside SOURCE.")
    revision: str | None = Field(None, description="Branch, tag or commit of a hub SOURCE.")
    token: str | None = Field(None, description="Hub token; the logged-in one is used by default.", exclude=True)
