"""Whether a config.json is of a language model that could be a source at all, before its sizes are looked at.

The reason that stands whatever else is changed comes first: a wrapper, then the family, then what the model is for.
"""

from pathlib import Path

from transformers import PretrainedConfig

from transmla.arch.families import FAMILIES
from transmla.arch.purpose import check_purpose
from transmla.arch.spec import check_family, load_config, read_raw_config
from transmla.arch.wrappers import check_no_wrapper


def admit(folder: Path) -> PretrainedConfig:
    """Read the config of a model that may be converted.

    Raises:
        CheckpointError: absent, not JSON, or refused by transformers' own validation.
        UnsupportedModelError: a model that is not converted, and why.
    """
    raw = read_raw_config(folder)
    check_no_wrapper(raw)
    # Before transformers reads it, which may refuse the spelling of what already decides.
    check_purpose(raw, FAMILIES[check_family(raw, folder / "config.json")])
    return load_config(folder)
