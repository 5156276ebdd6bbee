"""``transmla inspect``: what a model is and what it can become."""

from __future__ import annotations

from transmla.cli.output import show
from transmla.cli.request_options import AsJson, takes_request
from transmla.config import InspectRequest


@takes_request("inspect")
def inspect_model(request: InspectRequest, as_json: AsJson = False) -> None:
    """Read config and headers only: sizes, KV cache, ways to convert, and engines that load the result."""
    # Only now: PyTorch and Transformers take seconds to import, and --help must not wait for them.
    from transmla.cli.views.inspection import command_lines, inspection_view
    from transmla.convert.inspection import inspect

    inspection = inspect(request)
    show(inspection, inspection_view, as_json=as_json)
    if not as_json:
        ways = [verdict.command for verdict in inspection.engines] + [way.command for way in inspection.candidates]
        print(
            "Commands, where FILE is a text of yours", *map(command_lines, filter(None, dict.fromkeys(ways))), sep="\n"
        )
