"""A request and a model become choices, or a refusal whose advice has been tried.

What would help is proposed where the reason is known, and tried here, on the whole request: no advice is given that
the next try refuses. A proposal may need more than its own flags, a text or another storage type; then these are part
of it.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from transmla.arch.spec import AttentionSpec
from transmla.config import ConvertRequest
from transmla.config.refusal import TEXT, Change, Refusal
from transmla.convert.validate import Choices, choose
from transmla.errors import TransMLAError


def settle(request: ConvertRequest, spec: AttentionSpec, *, stored: torch.dtype) -> Choices:
    """Settle everything that no weight decides; see :func:`choose`.

    Raises:
        Refusal: why it is not possible, and only changes that make it possible.
        CheckpointError: a source of a type that cannot be converted.
    """
    try:
        return choose(request, spec, stored=stored)
    except Refusal as refusal:
        found = (possible(request, spec, change, stored=stored) for change in refusal.changes)
        # One change may be what another one leads to.
        changes = {tuple(way.change.items()): way.change for way in found if way is not None}
        raise Refusal(refusal.reason, *changes.values()) from None


@dataclass(frozen=True)
class Way:
    """A change of a request that makes it possible."""

    change: Change
    request: ConvertRequest
    choices: Choices


def possible(request: ConvertRequest, spec: AttentionSpec, change: Change, *, stored: torch.dtype) -> Way | None:
    """Complete ``change`` by what it needs besides, or return nothing where it does not help."""
    defaults = {name: field.default for name, field in ConvertRequest.model_fields.items()}
    for more in _supplements(request, change):
        whole = {**change, **more}
        values = {name: value if value else defaults[name] for name, value in whole.items()}
        changed = request.model_copy(update=values)
        try:
            return Way(whole, changed, choose(changed, spec, stored=stored))
        except TransMLAError:
            continue
    return None


def _supplements(request: ConvertRequest, change: Change) -> Iterator[Change]:
    """Yield what a change may need besides, the least first."""
    exact = change.get("exact", request.exact)
    # Where the logits are to stay as they are, nothing may be rounded.
    dtype: Change = {} if "dtype" in change else {"dtype": "float32" if exact else "bfloat16"}
    # An exact conversion reads no text, but for the routing of experts.
    other: Change = TEXT if not request.calibration else {"calibration": ()} if exact else {}
    text: Change = {} if "calibration" in change else other
    biases: Change = {} if "biases" in change else {"biases": "merge"}
    # An engine may load no checkpoint of a profile that was asked for.
    profile: Change = {} if "profile" in change else {"profile": None}
    for folded in ({}, biases, profile):
        yield folded
        yield {**folded, **text}
        yield {**folded, **dtype}
        yield {**folded, **text, **dtype}
