"""A request that cannot be carried out, and the changes of it that would help.

A change is known as fields of the request, not as words, so that whoever knows the model can try it before it is
offered (:mod:`transmla.convert.settle`). One place writes both as a sentence.
"""

from collections.abc import Iterator, Mapping
from typing import Any

from transmla.config.convert import ConvertRequest
from transmla.errors import UsageError

#: Fields of a request and the values that would help; ``None``, ``False``, zero and an empty tuple stand for no flag.
Change = Mapping[str, Any]

#: Stands for the user's own text.
TEXT: Change = {"calibration": ("FILE",)}
#: Stands for a size that suits every model.
HALF: Change = {"kv_ratio": 0.5}


class Refusal(UsageError):
    """Flags that contradict each other, the model or an engine.

    Attributes:
        reason: without a full stop.
        changes: any one of them may help.
    """

    def __init__(self, reason: str, *changes: Change) -> None:
        """Write the sentence."""
        advice = ", or ".join(map(_advice, changes))
        super().__init__(f"{reason}: {advice}." if advice else f"{reason}.")
        self.reason, self.changes = reason, changes


def flags_of(change: Change) -> Iterator[str]:
    """Spell a change as the command line does, a flag and its value at a time."""
    for field, value in change.items():
        if value is True:
            yield ConvertRequest.spell(field)
        elif value:
            for one in value if isinstance(value, tuple) else (value,):
                yield f"{ConvertRequest.spell(field)} {one}"


def _advice(change: Change) -> str:
    given = " ".join(flags_of(change))
    dropped = " and ".join(ConvertRequest.spell(field) for field, value in change.items() if not value)
    if not given:
        return f"drop {dropped}"
    return f"pass {given} without {dropped}" if dropped else f"pass {given}"
