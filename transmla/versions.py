"""The releases of other libraries that the tests were run with: newer ones work as a rule, and are told of."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from importlib import metadata
from types import MappingProxyType

from packaging.version import Version

from transmla import __version__
from transmla.records import Versions

NEWEST_TESTED: Mapping[str, str] = MappingProxyType(
    {
        "transformers": "5.24",
        "datasets": "5.2",
        "accelerate": "1.15",
        "peft": "0.21",
        "lm-eval": "0.4.13",
    }
)
"""The newest release of each library that was tested, without the numbers that only mend."""


def is_newer(found: str, tested: str) -> bool:
    """Return whether a release is a newer one than was tested, counting as many numbers as ``tested`` has."""
    wanted = Version(tested).release
    return Version(found).release[: len(wanted)] > wanted


def untested(version_of: Callable[[str], str] = metadata.version) -> dict[str, str]:
    """Return the installed releases that are newer than the tested ones, by library."""
    newer = {}
    for name, tested in NEWEST_TESTED.items():
        try:
            found = version_of(name)
        except metadata.PackageNotFoundError:
            continue
        if is_newer(found, tested):
            newer[name] = found
    return newer


def untested_notice() -> str | None:
    """Return the line that tells of untested releases, if there are any."""
    if not (newer := untested()):
        return None
    each = ", ".join(f"{name} {found} (tested up to {NEWEST_TESTED[name]})" for name, found in newer.items())
    return f"Note: newer than tested with this release of transmla: {each}. `transmla verify` checks a conversion."


def loaded_versions() -> Versions:
    """Return the versions of the libraries that compute."""
    # Only now: the command line asks this module for its notice before it needs either.
    import torch
    import transformers

    return Versions(transmla=__version__, torch=torch.__version__, transformers=transformers.__version__)
