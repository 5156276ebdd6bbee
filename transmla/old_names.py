"""Names of earlier releases, and what they are called now: flags, recipe keys, their values, and fields of reports.

Whatever was renamed is read all the same: :class:`~transmla.config.request.Request` and
:class:`~transmla.records.Record` pass what they are given through this table, the command line its flags, and a resumed
run what the interrupted one noted. Nothing is written under an old name.
"""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

#: By class, what its fields were called.
FIELDS: Mapping[str, Mapping[str, str]] = MappingProxyType(
    {
        "EvalRequest": {
            "contexts": "needle_lengths",
            "num_depths": "needle_depths",
            "num_trials": "needle_trials",
            "speed_contexts": "bench_contexts",
        },
        "GenerateRequest": {"stock": "no_absorb"},
        "Memory": {"optimiser": "optimizer"},
        "DataReport": {"num_passages": "num_windows"},
    }
)

_FORM = {"form": {"stock": "expanded"}}
_METHOD = {"method": {"complex": "fitted"}}
#: By class and field, what its values were called.
VALUES: Mapping[str, Mapping[str, Mapping[str, str]]] = MappingProxyType(
    {
        "ConvertRequest": {**_METHOD, "latent_norm": {"live": "fitted"}, "biases": {"fold": "merge"}},
        "FinetuneRequest": {"latent_norm": {"live": "fitted"}},
        "PlanSummary": _METHOD,
        "BenchModel": _FORM,
        "BenchCell": _FORM,
        "GenerationReport": _FORM,
    }
)


def renamed(owner: str, values: Any) -> Any:
    """Return what the fields of a class are given, under the names that they have now.

    A field that is given under both names keeps both, so that the old one is refused like any other unknown key.
    """
    if not isinstance(values, Mapping):
        return values
    fields, words = FIELDS.get(owner, {}), VALUES.get(owner, {})
    found = {}
    for name, value in values.items():
        new = fields.get(name, name)
        new = name if new != name and new in values else new
        known = words.get(new, {})
        found[new] = known.get(value, value) if isinstance(value, str) else value
    return found
