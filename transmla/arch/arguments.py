"""Arguments that transformers hands to what stands in the place of one of its modules."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from transmla.errors import UnsupportedModelError


def refuse_arguments(given: Mapping[str, Any], where: str) -> None:
    """Make sure that arguments which are not read ask for nothing.

    Raises:
        UnsupportedModelError: one does, as may be with a newer release of transformers.
    """
    for name, value in given.items():
        if value is not None and value is not False:
            raise UnsupportedModelError(
                f"This release of transformers hands {where} the argument {name!r}, which is not known here: install "
                "one of the releases that were tested."
            )
