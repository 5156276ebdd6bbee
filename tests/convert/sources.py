"""Sources that both commands that open one refuse alike."""

from __future__ import annotations

from pathlib import Path

import pytest

from transmla.config import ConvertRequest, InspectRequest
from transmla.convert.inspection import inspect
from transmla.convert.plan import plan_conversion
from transmla.errors import TransMLAError


def refusal(folder: Path) -> str:
    """The one reason that both commands give."""
    requests = (
        (inspect, InspectRequest(model=str(folder))),
        (plan_conversion, ConvertRequest(model=str(folder), output_dir=folder.parent / "out", exact=True)),
    )
    reasons = []
    for command, request in requests:
        with pytest.raises(TransMLAError) as caught:
            command(request)
        reasons.append(str(caught.value))
    assert reasons[0] == reasons[1]
    assert not (folder.parent / "out").exists()
    return reasons[0]
